"""`python -m bench.raw_loop`: one HTTP client of lichen beside a raw `llama_decode` loop.

Same file, threads, prompt tokens, greedy sampling and flash attention; each side in a fresh process, in
turn. Says how much of the bare library's speed reaches a client: rates of tokens 2..n, and end to end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench import peer as peers
from bench.answer import AnswerError, read_answer
from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import server_flags
from bench.numbers import paired_ratio, rounded
from bench.peer import ROOT, BenchError, Settings, environment
from bench.server import ProcessorWatch, free_port, run_to_end, running
from bench.stream import exchange_alone, request_bytes
from bench.table import aligned, raw_rows
from lichen.errors import LichenError

LIMITS = (64, 256)
WARM_UP = "The lighthouse keeper opened the door and"
REQUEST_LIMIT_S = 120.0
_PEOPLE = (
    "an old sailor",
    "a young baker",
    "two sisters",
    "the clockmaker",
    "a tired doctor",
    "a blind painter",
)
_PLACES = ("a village by the sea", "the mountain railway", "a library under the city", "an island of bees")


def prompts(count: int) -> list[tuple[str, int]]:
    """`count` story openings for each limit, no two with the same first words: no prefix cache helps."""
    texts = [
        f"{person.capitalize()} came to {place} one winter evening. The story begins like this:"
        for place in _PLACES
        for person in _PEOPLE
    ]
    if count * len(LIMITS) > len(texts):
        raise BenchError(f"There are {len(texts) // len(LIMITS)} prompts for each length, not {count}.")
    return [(texts[index], LIMITS[index % len(LIMITS)]) for index in range(count * len(LIMITS))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when anything failed."""
    flags = server_flags("raw_loop", "lichen beside the bare library", runs=5, context=2048, slots=4)
    flags.add_argument("--prompts", type=int, default=3, help="of each length in a run")
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(raw_rows(record)))
    print(json.dumps({"bench": "raw_loop", "result": path.name, "ratios": record["ratios"]}))
    return 0 if record["status"] == "ok" else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    lichen = peers.load("lichen")
    settings = Settings(
        model=model, threads=options.threads, slots=options.slots, context=options.context, port=0
    )
    record: dict[str, Any] = {
        "kind": "raw_loop",
        "status": "ok",
        "birth": certificate(model),
        "settings": {name: getattr(options, name) for name in ("threads", "slots", "context", "prompts")},
        "servers": {"lichen": {"command": lichen.shown_command(settings), **lichen.identity()}},
        "runs": [],
    }
    run_to_end(_alternate(options, settings, record))
    close_certificate(record["birth"])
    conclude(record)
    return record


async def _alternate(options: argparse.Namespace, settings: Settings, record: dict[str, Any]) -> None:
    chosen = prompts(options.prompts)
    for run in range(options.runs):
        sides = [("lichen", _over_http), ("raw", _raw)]
        for name, side in sides if run % 2 == 0 else reversed(sides):
            entry: dict[str, Any] = {"run": run, "side": name, "status": "ok", "error": None}
            record["runs"].append(entry)
            try:
                entry.update(await side(settings, chosen))
            except BenchError as error:
                entry.update(status="failed", error=str(error))
            print(
                f"run {run + 1} {name:<7} {entry.get('by_limit', entry['error'])}",
                file=sys.stderr,
                flush=True,
            )


async def _over_http(settings: Settings, chosen: Sequence[tuple[str, int]]) -> dict[str, Any]:
    lichen = peers.load("lichen")
    own = Settings(
        model=settings.model,
        threads=settings.threads,
        slots=settings.slots,
        context=settings.context,
        port=free_port(),
    )
    async with running(lichen, own) as server:
        await _complete(own.port, WARM_UP, 16)
        with ProcessorWatch(server.process.pid) as processor:
            answers = [await _complete(own.port, text, limit) for text, limit in chosen]
    return {**_by_limit(answers, chosen), "foreign_cores": round(processor.foreign_cores, 3)}


async def _complete(port: int, text: str, limit: int) -> dict[str, Any]:
    body = {
        "prompt": text,
        "max_tokens": limit,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = request_bytes(port, "/v1/completions", body)
    record = await asyncio.to_thread(exchange_alone, port, request, timeout=REQUEST_LIMIT_S)
    try:
        answer = read_answer(record)
    except AnswerError as error:
        raise BenchError(f"lichen cannot answer: {error}") from error
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "ttft_s": answer.ttft,
        "decode_s": sum(answer.gaps),
        "total_s": answer.total,
        "text": answer.text,
    }


async def _raw(settings: Settings, chosen: Sequence[tuple[str, int]]) -> dict[str, Any]:
    job = {
        "model": str(settings.model),
        "threads": settings.threads,
        "context": settings.context,
        "warm_up": WARM_UP,
        "prompts": chosen,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.raw_decode"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    )
    try:
        with ProcessorWatch(process.pid) as processor:
            output, errors = await process.communicate(json.dumps(job).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise BenchError(f"The raw loop ended with exit code {process.returncode}: {errors.decode()[-300:]}")
    result = json.loads(output)
    return {
        **_by_limit(result["answers"], chosen),
        "system_info": result["system_info"],
        "foreign_cores": round(processor.foreign_cores, 3),
    }


def _by_limit(answers: Sequence[Mapping[str, Any]], chosen: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Medians over a run's prompts of each length, in tokens/s and ms, and the texts themselves."""
    by_limit: dict[str, Any] = {}
    for limit in LIMITS:
        own = [answer for answer, (_, asked) in zip(answers, chosen, strict=True) if asked == limit]
        decode = [(a["completion_tokens"] - 1) / a["decode_s"] for a in own if a["decode_s"] > 0]
        by_limit[str(limit)] = {
            "decode_tokens_per_second": rounded(statistics.median(decode), 3) if decode else None,
            "end_to_end_tokens_per_second": round(
                statistics.median(a["completion_tokens"] / a["total_s"] for a in own), 3
            ),
            "ttft_ms": round(statistics.median(a["ttft_s"] for a in own) * 1e3, 2),
            "tokens": [a["completion_tokens"] for a in own],
        }
    return {
        "by_limit": by_limit,
        "prompt_tokens": [answer["prompt_tokens"] for answer in answers],
        "texts": [answer["text"] for answer in answers],
    }


def conclude(record: dict[str, Any]) -> None:
    """Ratios lichen / raw, paired by run; whether both sides saw the same prompts and said the same."""
    sides: dict[str, dict[int, dict[str, Any]]] = {"lichen": {}, "raw": {}}
    for entry in record["runs"]:
        if entry["status"] == "ok":
            sides[entry["side"]][entry["run"]] = entry
        else:
            record["status"] = "failed"
    metrics = ("decode_tokens_per_second", "end_to_end_tokens_per_second", "ttft_ms")
    record["summary"], record["ratios"] = {}, {}
    for limit in map(str, LIMITS):
        values = {
            name: {m: {run: e["by_limit"][limit][m] for run, e in runs.items()} for m in metrics}
            for name, runs in sides.items()
        }
        record["summary"][limit] = {
            name: {m: rounded(statistics.median(v.values()), 3) if v else None for m, v in own.items()}
            for name, own in values.items()
        }
        record["ratios"][limit] = {m: paired_ratio(values["lichen"][m], values["raw"][m]) for m in metrics}
    both = sorted(sides["lichen"].keys() & sides["raw"].keys())
    pairs = [(sides["lichen"][run], sides["raw"][run]) for run in both]
    record["same_prompt_tokens"] = all(ours["prompt_tokens"] == raw["prompt_tokens"] for ours, raw in pairs)
    record["same_texts"] = [
        sum(ours == raw for a, b in pairs for ours, raw in zip(a["texts"], b["texts"], strict=True)),
        sum(len(a["texts"]) for a, _ in pairs),
    ]
    for entry in record["runs"]:
        entry.pop("texts", None)  # compared, and too long to keep


if __name__ == "__main__":
    sys.exit(main())
