"""`python -m bench.speculation`: what drafted tokens bring, for each kind of work and each layout of the model.

One daemon with speculation on and llama-server in its best setting answer the same questions in turn: lichen
once with `"speculation": false` and once with drafts, llama-server plain and in the setting that was fastest in
a trial beforehand. What counts is each server's own time of tokens 2..n, with the prompt computed before.
Answers are greedy, so lichen's two say the same but for near-ties; how many did is in the result. No question
is asked twice with drafts, so past answers help no more than they would. Then sixteen clients at once with and
without; a drafter that always lies; and what the measured cost of wide steps allows at the measured acceptance
(`speculation_bound.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import random
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import lichen.config
from bench.certificate import certificate, close_certificate, model_file, save
from bench.copying import copying
from bench.flags import model_flags
from bench.peer import BenchError, Peer, Settings
from bench.prompts import data_folder
from bench.server import free_port, run_to_end, running
from bench.speculation_bound import answers_and_lies, bound, step_costs
from bench.speculation_sides import (
    COPYING,
    alternate,
    ask,
    crowd,
    crowd_summary,
    peer_settings,
    rate_of,
    speculating,
    try_settings,
)
from bench.speculation_tables import speculation_rows
from bench.table import aligned
from lichen.errors import LichenError
from lichen.runtime import layouts

LONGEST = 3000  # characters of a question
SHORTEST = 8  # tokens of an answer that counts: a rate of few tokens is mostly noise
# Spec-Bench's tasks; its other categories are the eight of MT-Bench.
OWN = ("math_reasoning", "qa", "rag", "summarization", "translation")
QUESTIONS_SHARE = 0.55  # of the minutes of a layout
AIMS = {"copying": 1.4, "copying_peer": 1.2, "kind": 0.98, "liar": 0.95, "clients": 0.98}
QUICK = {"questions": 1, "tokens": 48, "budget": 4.0, "runs": 1, "repeats": 5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when anything failed."""
    flags = model_flags("speculation", "drafted tokens or none")
    flags.add_argument("--drafters", default="suffix", choices=("auto", "suffix", "model"))
    flags.add_argument("--draft-model", help="a GGUF file, for --drafters model or auto and for llama-server")
    flags.add_argument("--layouts", default="source,f16", help="of the model, with commas")
    flags.add_argument("--questions", type=int, default=4, help="of each kind of work")
    flags.add_argument("--kind", action="append", default=[], help="only these kinds; may repeat")
    flags.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    flags.add_argument("--runs", type=int, default=4, help="of sixteen clients at once")
    flags.add_argument("--repeats", type=int, default=15, help="of each width whose cost is measured")
    flags.add_argument("--budget", type=float, default=20, help="minutes for everything, about")
    flags.add_argument("--context", type=int, default=2048)
    flags.add_argument("--quick", action="store_true", help=f"a look in four minutes: {QUICK}")
    flags.add_argument("--no-peer", action="store_true", help="without llama-server")
    options = flags.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(speculation_rows(record)))
    for line in record["verdicts"]:
        print(("reached: " if line["reached"] else "MISSED: ") + line["aim"] + f" ({line['value']:.3f})")
    ratios = {
        name: {kind: cell["ratio"] for kind, cell in layout["summary"].items()}
        for name, layout in record["layouts"].items()
    }
    missed = [line["aim"] for line in record["verdicts"] if not line["reached"]]
    print(json.dumps({"bench": "speculation", "result": path.name, "ratios": ratios, "missed": missed}))
    return 0 if record["status"] == "ok" else 1


def questions(data: Path | None, count: int) -> dict[str, list[dict[str, Any]]]:
    """Kind of work -> request bodies: Spec-Bench's first turns by category, and work that copies."""
    found: dict[str, list[dict[str, Any]]] = {}
    source = data / "spec-bench" / "question.jsonl" if data else None
    if source is not None and source.is_file():
        for line in source.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            text = str(entry["turns"][0])
            if len(text) <= LONGEST:
                body = {"messages": [{"role": "user", "content": text}]}
                category = str(entry["category"])
                found.setdefault(category if category in OWN else "mt-bench", []).append(body)
    for bodies in found.values():
        random.Random(1).shuffle(bodies)
    return {kind: bodies[:count] for kind, bodies in {**copying(count), **found}.items()}


def layout_file(source: Path, layout: str) -> Path:
    """The model's file in a layout, made in lichen's store where it is not there. Raises LichenError."""
    if layout == layouts.SOURCE:
        return source
    home = lichen.config.load().config.home
    with source.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    asyncio.run(layouts.make(source, sha256, layout, home))
    found = layouts.find(home, sha256, layout)
    if found is None:
        raise BenchError(f"The layout {layout} is not in the store although it was made.")
    return found[1]


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    source = model_file(options.model)
    lichen_peer = speculating(options)
    names = [name for name in options.layouts.split(",") if name]
    settings = Settings(
        model=source, threads=options.threads, slots=1, context=options.context, port=free_port()
    )
    given = ("threads", "context", "tokens", "questions", "runs", "drafters")
    record: dict[str, Any] = {
        "kind": "speculation",
        "status": "ok",
        "birth": certificate(source),
        "settings": {name: getattr(options, name) for name in given},
        "servers": {"lichen": _described(lichen_peer, settings)},
        "layouts": {},
        "runs": [],
    }
    if not options.no_peer:
        record["servers"]["llama_server"] = _described(peer_settings(None)["plain"], settings)
    work = questions(data_folder(), max(options.questions, 8))
    if options.kind:
        work = {kind: bodies for kind, bodies in work.items() if kind in options.kind}
    for name in names:
        path = layout_file(source, name)
        own = dataclasses.replace(settings, model=path)
        record["layouts"][name] = {"size": path.stat().st_size}
        run_to_end(_layout(options, own, name, work, record, options.budget / len(names)))
    close_certificate(record["birth"])
    conclude(record)
    return record


def _described(peer: Peer, settings: Settings) -> dict[str, Any]:
    return {"title": peer.title, "command": peer.shown_command(settings), **peer.identity()}


async def _layout(
    options: argparse.Namespace,
    settings: Settings,
    name: str,
    work: dict[str, list[dict[str, Any]]],
    record: dict[str, Any],
    minutes: float,
) -> None:
    """Everything that is measured of one file."""
    layout = record["layouts"][name]
    few = {kind: bodies[: options.questions] for kind, bodies in work.items()}
    found = {} if options.no_peer else peer_settings(options.draft_model)
    if found:
        bodies = [work[kind][-1] for kind in COPYING if kind in work]  # not among those that count
        bodies = (bodies or [next(iter(work.values()))[-1]])[: max(2, options.questions)]
        layout["trial"] = await try_settings(found, settings, bodies, options.tokens)
        layout["peer_setting"] = max(
            (one for one in found if one != "plain"), key=layout["trial"].__getitem__
        )
    entries: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(running(speculating(options), settings))
        sides: dict[str, Any] = {"plain": (ours, False), "drafted": (ours, True)}
        for side, setting in (("peer_plain", "plain"), ("peer_drafted", layout.get("peer_setting", ""))):
            if setting in found:
                own = dataclasses.replace(settings, port=free_port())
                sides[side] = (await stack.enter_async_context(running(found[setting], own)), None)
        for server in {id(server): server for server, _ in sides.values()}.values():
            await ask(server, {"messages": [{"role": "user", "content": "Count to forty."}]}, 32)
        await alternate(sides, few, options.tokens, minutes * QUESTIONS_SHARE, entries)
    lichen_peer = speculating(options)
    crowded = dataclasses.replace(settings, context=min(1024, options.context), port=free_port())
    layout["clients"] = await crowd(lichen_peer, crowded, work, options.tokens, options.runs)
    texts, layout["lies"] = await answers_and_lies(
        settings.model, few, options, max(1, options.questions // 2)
    )
    layout["step_s"] = {
        str(width): round(seconds, 6)
        for width, seconds in step_costs(settings.model, options.threads, options.repeats).items()
    }
    layout["bound"] = bound(texts, {int(width): seconds for width, seconds in layout["step_s"].items()})
    record["runs"] += [entry | {"layout": name} for entry in entries]


def conclude(record: dict[str, Any]) -> None:
    """For each layout and kind: rates over all its tokens, their ratios; and what was aimed at."""
    for name, layout in record["layouts"].items():
        kinds: dict[str, list[dict[str, Any]]] = {}
        for entry in record["runs"]:
            if entry["layout"] == name and min(one["tokens"] for one in entry["sides"].values()) > SHORTEST:
                kinds.setdefault(entry["work"], []).append(entry)
                if entry["work"] in COPYING:
                    kinds.setdefault("copying", []).append(entry)
                kinds.setdefault("all", []).append(entry)
        if not kinds:
            record["status"] = "failed"
        order = sorted(kinds, key=lambda kind: (kind in ("copying", "all"), kind == "all"))
        layout["summary"] = {kind: _cell(kinds[kind], layout["bound"].get(kind)) for kind in order}
        layout["crowd"] = crowd_summary(layout["clients"])
        lies = [entry for entry in layout["lies"] if entry["plain"]["tokens"] > SHORTEST]
        layout["liar_ratio"] = (
            round(rate_of([e["liar"] for e in lies]) / rate_of([e["plain"] for e in lies]), 4)
            if lies
            else None
        )
    record["verdicts"] = _verdicts(record["layouts"])


def _cell(entries: Sequence[dict[str, Any]], bounds: dict[str, Any] | None) -> dict[str, Any]:
    rates = {side: rate_of([entry["sides"][side] for entry in entries]) for side in entries[0]["sides"]}
    ratios = [rate_of([entry["sides"]["drafted"]]) / rate_of([entry["sides"]["plain"]]) for entry in entries]
    drafted = sum(entry["sides"]["drafted"]["draft_n"] for entry in entries)
    accepted = sum(entry["sides"]["drafted"]["draft_n_accepted"] for entry in entries)
    tokens = sum(entry["sides"]["drafted"]["tokens"] for entry in entries)
    ratio = rates["drafted"] / rates["plain"]
    best = max((rate for side, rate in rates.items() if side.startswith("peer")), default=None)
    limit = None if bounds is None else bounds["attainable"]
    return {
        "answers": len(entries),
        "same": sum(entry["same"] for entry in entries),
        "rates": rates,
        "ratio": round(ratio, 4),
        "median_ratio": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "peer_ratio": None if best is None else round(rates["drafted"] / best, 4),
        "accepted": round(accepted / drafted, 4) if drafted else None,
        "tokens_a_step": round(tokens / max(1, tokens - accepted), 3),
        "attainable": limit,
        "of_attainable": None if limit is None else round(ratio / limit, 4),
        "memory_bound_computed": None if bounds is None else bounds["attainable_memory_bound_computed"],
    }


def _verdicts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, what was measured, and whether that is enough."""
    lines: list[dict[str, Any]] = []

    def judge(aim: str, value: float | None, least: float) -> None:
        if value is not None:
            lines.append({"aim": aim, "value": value, "least": least, "reached": value >= least})

    copies = [layout["summary"]["copying"] for layout in found.values() if "copying" in layout["summary"]]
    if copies:
        best = max(copies, key=lambda cell: cell["ratio"])
        judge(
            f"copying at least {AIMS['copying']} x plain on the best layout", best["ratio"], AIMS["copying"]
        )
        fastest = max(copies, key=lambda cell: cell["rates"]["drafted"])
        aim = f"copying at least {AIMS['copying_peer']} x llama-server's best"
        judge(aim, fastest["peer_ratio"], AIMS["copying_peer"])
    for name, layout in found.items():
        for kind, cell in layout["summary"].items():
            if kind not in ("copying", "all"):
                judge(f"{name}, {kind}: at least {AIMS['kind']} x plain", cell["ratio"], AIMS["kind"])
        judge(f"{name}: lies at least {AIMS['liar']} x plain", layout["liar_ratio"], AIMS["liar"])
        many = layout["crowd"]
        aim = f"{name}, sixteen clients: at least {AIMS['clients']} x plain"
        judge(aim, many and many["ratio"], AIMS["clients"])
    return lines


if __name__ == "__main__":
    sys.exit(main())
