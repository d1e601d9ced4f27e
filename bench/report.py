"""`python -m bench.report RESULT.json ...`: writes results into docs/benchmarks.md and draws the pictures.

Each kind of result has its place between two markers in the page; everything between them is made from
the JSON file that it names, and `--check` says whether it still is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import foretold, intent_tables, learning_tables, replanning_tables, speculation_tables
from bench.peer import ROOT, BenchError
from bench.table import (
    import_rows,
    markdown,
    prefix_rows,
    quantize_rows,
    raw_rows,
    serving_rows,
    soak_rows,
    startup_rows,
    structured_rows,
)

PAGE = ROOT / "docs" / "benchmarks.md"
FOREIGN_CORES_LIMIT = 0.1  # more than that, and other processes disturbed a run
_PICTURES = {
    "serving": "draw",
    "distillation": "draw_learning",
    "predictions": "draw_predictions",
    "lesson": "draw_lesson",
}
_FLAG = re.compile(r"(\w+) = 1\b")
_BLOCK = re.compile(r"<!-- bench:\w+:begin -->.*?<!-- bench:\w+:end -->", re.DOTALL)
_RESULT = re.compile(r"\(\.\./bench/results/([\w.-]+\.json)\)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page (and pictures), or with --check compare it. 1 when it differs or cannot be written."""
    flags = argparse.ArgumentParser(
        prog="python -m bench.report", description="results into docs/benchmarks.md"
    )
    flags.add_argument("results", nargs="*", type=Path, help="files of bench/results/")
    flags.add_argument("--check", action="store_true", help="only compare the page with the results it names")
    options = flags.parse_args(arguments)
    try:
        if options.check:
            return _check()
        publish(options.results)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def publish(results: Iterable[Path]) -> None:
    """Put results into the page, and draw pictures for those of serving and of predictions. Raises BenchError."""
    text = PAGE.read_text(encoding="utf-8")
    for path in results:
        record = load(path)
        text = replace_block(text, record["kind"], block(record, path.name))
        if (name := _PICTURES.get(record["kind"])) is not None:
            from bench import pictures

            getattr(pictures, name)(record, ROOT / "docs" / "img")
    PAGE.write_text(text, encoding="utf-8")


def _check() -> int:
    text = PAGE.read_text(encoding="utf-8")
    wanted = text
    made = "".join(_BLOCK.findall(text))  # what else names results was written by hand
    for name in dict.fromkeys(_RESULT.findall(made)):
        record = load(ROOT / "bench" / "results" / name)
        wanted = replace_block(wanted, record["kind"], block(record, name))
    if wanted != text:
        print(f"{PAGE.name} differs from its results; run python -m bench.report on them", file=sys.stderr)
        return 1
    print(f"{PAGE.name}: as its results say")
    return 0


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises BenchError when it is missing or not one."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read as a result: {error}") from error
    if not isinstance(record, dict) or record.get("kind") not in _BODIES:
        raise BenchError(f"{path} is not a result of {', '.join(_BODIES)}.")
    return record


def replace_block(page: str, kind: str, content: str) -> str:
    """The page with what stands between the markers of `kind` replaced. Raises BenchError without them."""
    begin, end = f"<!-- bench:{kind}:begin -->", f"<!-- bench:{kind}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise BenchError(f"The page needs {begin} and then {end}, once each.")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.partition(end)[2]}"


def block(record: dict[str, Any], file_name: str) -> str:
    """What stands between the markers: where the numbers come from, the tables, and what to know of them."""
    parts = [_origin(record, file_name), *_BODIES[record["kind"]](record)]
    notes = [*_build_notes(record), *_server_notes(record), *_disturbance(record), *_failures(record)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def _origin(record: dict[str, Any], file_name: str) -> str:
    birth, settings = record["birth"], record["settings"]
    machine, model = birth["machine"], birth["model"]
    dirty = ", with uncommitted changes" if birth["dirty"] else ""
    slots = f", {settings['slots']} slots of {settings['context']:,} tokens" if "slots" in settings else ""
    return (
        f"{birth['date'][:10]}, {machine['cpu']} ({machine['isa']}), {machine['cores']:g} cores, "
        f"{machine['memory_gb']:g} GB, {machine['system']}; commit `{birth['commit'][:10]}`{dirty}; "
        f"`{model['file']}` ({model['size'] / 1e6:.1f} MB); {settings['threads']} threads{slots}. "
        f"All numbers: [{file_name}](../bench/results/{file_name})."
    )


def _serving_body(record: dict[str, Any]) -> list[str]:
    body = [
        "The name of a load is prompt, longest answer in tokens, clients. Medians over the runs; ratios are taken "
        "within each run, then their median. Lower is better for the ratio of p95 TTFT (time to first token).",
        markdown(serving_rows(record)),
    ]
    if any(scenario["prompt"] == "shared" for scenario in record["scenarios"]):
        body += [
            "Prompts that share their first 1,000 tokens: the first one is cold, the others find the prefix in the "
            "cache.",
            markdown(prefix_rows(record)),
        ]
    return [
        *body,
        "![Tokens a second against clients](img/throughput.svg)",
        "![Time to first token against clients](img/ttft.svg)",
    ]


def _raw_body(record: dict[str, Any]) -> list[str]:
    same, of = record["same_texts"]
    tokens = "the same" if record["same_prompt_tokens"] else "**different**"
    return [
        markdown(raw_rows(record)),
        f"Both sides saw {tokens} numbers of prompt tokens; {same} of {of} answers are equal, letter for letter.",
    ]


def _startup_body(record: dict[str, Any]) -> list[str]:
    body = [markdown(startup_rows(record), left=1)]
    if record["imports"]:
        body += [
            f"What lichen imports until it is ready: {record['imports']['modules']} modules, "
            f"{record['imports']['total_ms']:.0f} ms under `-X importtime` (which slows imports down), most of it in:",
            markdown(import_rows(record), left=1),
        ]
    return body


def _structured_body(record: dict[str, Any]) -> list[str]:
    validity = record["validity"]
    return [
        f"{validity['valid']} of {validity['requests']} answers over twenty schemas, drawn at temperature 0.8, ended by "
        f"themselves and validate; {validity['cut_by_length']} were cut by their length.",
        f"Rates are the daemon's own, of tokens 2..{record['settings']['tokens']} of each answer:",
        markdown(structured_rows(record), left=1),
    ]


def _soak_body(record: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in record["requests"].items())
    left = ", ".join(f"{count} {name}" for name, count in record["left_behind"].items())
    return [
        f"{record['settings']['minutes']:g} minutes of mixed load from {record['settings']['clients']} clients: {counts}. "
        f"Left behind at the end: {left}.",
        markdown(soak_rows(record), left=1),
    ]


def _quantize_body(record: dict[str, Any]) -> list[str]:
    settings, reference, proxy = record["settings"], record["reference"], record["proxy"]
    speeds = (
        "the best of three rounds over all files"
        if "speeds" in record["seconds"]
        else "of one moment for each file, while other programs ran, and no comparison"
    )
    noise = ", with uniform noise of up to half a step of Q4_1" if settings["dither"] else ""
    minutes = (
        sum(seconds for name, seconds in record["seconds"].items() if name not in ("scores", "speeds")) / 60
    )
    return [
        f"The reference is this model with its matrices as F16{noise}: {reference['bytes'] / 1e6:.1f} MB, perplexity "
        f"{reference['perplexity']:.3f}. Each budget is the bytes of what llama.cpp's own quantizer makes of it under that "
        f"name. Importance: {settings['calibration_tokens']:,} tokens of the first 60 % of tinyshakespeare and of "
        f"training questions of gsm8k and banking77, the same for both; sensitivities: {settings['measure_tokens']:,} "
        f"tokens of it, {settings['span']} layers a measurement. Scored by the engine on {reference['positions']:,} "
        "positions of the last 20 % of tinyshakespeare and of test questions. ± are standard errors over positions.",
        markdown(quantize_rows(record), left=2),
        f"Ratings of {len(proxy['pairs'])} tensors and types drawn by chance beside their measured KL: correlation of "
        f"logarithms {proxy['correlation_of_logs']:.2f}, median of measured over rated {proxy['median_ratio']:.2f}. All "
        f"files and measurements took {minutes:.0f} minutes beside other work; tokens/s are {speeds}.",
    ]


_BODIES = {
    "speculation": speculation_tables.speculation_body,
    "distillation": speculation_tables.distillation_body,
    "lesson": learning_tables.lesson_body,
    "sequence": learning_tables.sequence_body,
    "learning_speed": learning_tables.speed_body,
    "learn_while_serving": learning_tables.beside_body,
    "quantize": _quantize_body,
    "quantize_dithered": _quantize_body,
    "serving": _serving_body,
    "raw_loop": _raw_body,
    "startup": _startup_body,
    "structured": _structured_body,
    "soak": _soak_body,
    "predictions": foretold.body,
    "intents": intent_tables.body,
    "replanning": replanning_tables.body,
}


def instruction_sets(system_info: str) -> set[str]:
    """What a build says that it was compiled with: the flags that are on in llama.cpp's system info."""
    return set(_FLAG.findall(system_info))


def _build_notes(record: dict[str, Any]) -> list[str]:
    """Where the first server's build can use instructions that another's cannot, or the other way round."""
    servers = list(record.get("servers", {}).values())
    if len(servers) < 2:
        return []
    subject, *others = servers
    notes = []
    for other in others:
        ours, theirs = (instruction_sets(one["system_info"]) for one in (subject, other))
        for more, less, extra in ((subject, other, ours - theirs), (other, subject, theirs - ours)):
            if extra:
                notes.append(
                    f"**Not the same build**: {more['title']}'s llama.cpp was compiled with "
                    f"{', '.join(sorted(extra))}, which {less['title']}'s was not; a part of their difference may be "
                    "that."
                )
    return notes


def _server_notes(record: dict[str, Any]) -> list[str]:
    notes = []
    for server in record.get("servers", {}).values():
        versions = ", ".join(f"{name} {version}" for name, version in server["versions"].items())
        said = "".join(f"; {note}" for note in server.get("notes", []))
        notes.append(f"{server.get('title', 'lichen')}: {versions}; `{server['command']}`{said}.")
    return notes


def _disturbance(record: dict[str, Any]) -> list[str]:
    shares = [entry["foreign_cores"] for entry in record.get("runs", []) if "foreign_cores" in entry]
    disturbed = sum(share > FOREIGN_CORES_LIMIT for share in shares)
    if not disturbed:
        return []
    return [
        f"Other processes used more than {FOREIGN_CORES_LIMIT} cores in {disturbed} of {len(shares)} measurements."
    ]


def _failures(record: dict[str, Any]) -> list[str]:
    entries = [*record.get("runs", []), *record.get("starts", [])]
    failed = [entry for entry in entries if entry.get("status", "ok") != "ok"]
    if not failed:
        return []
    return [
        f"{len(failed)} of {len(entries)} measurements failed and are left out of the medians; the file says why."
    ]


if __name__ == "__main__":
    sys.exit(main())
