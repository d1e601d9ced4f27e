"""`python -m bench.distillation`: what a draft head learns while the model serves, and what that is worth.

One model in this process, with a head that learns. Requests of one domain come for some minutes, then those
of another. Meanwhile every version of the head is graded on answers that were computed before and are never
learned from: acceptance by position, for both domains. Before and after, questions that were not part of
the traffic are asked with drafts and without, one after the other, and the time between two tokens is
taken from the traffic itself. Rates are those of the head that there is then, of the one it began with, and of
none, in turn. At the end the model is loaded again, and must serve the last head. Domains: gsm8k's school mathematics, banking77's customers.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import model_flags
from bench.prompts import data_folder
from lichen.adapters.distil_task import model_sizes
from lichen.adapters.draft_head import DraftHead
from lichen.adapters.grading import grade
from lichen.adapters.states import Run, read_segments, segment_files
from lichen.errors import LichenError
from lichen.runtime.generation import Generation
from lichen.runtime.sequence import Piece, SamplingOptions
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.runtime.speculation.head import HeadDrafter
from lichen.runtime.speculation.learning import HeadLearning

DOMAINS = ("school mathematics", "bank customers")
SAMPLE_S = 5.0
NEAR = 0.05  # of first guesses right: so much below another level counts as that level
SIDES = ["plain", "fresh", "drafted"]


@dataclasses.dataclass(frozen=True)
class Domain:
    """Questions: those that only measure, and an endless stream of others."""

    name: str
    held_out: list[str]
    traffic: Iterator[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print what happened and one JSON line, write the result. 1 when it failed."""
    flags = model_flags("distillation", "a draft head that learns from traffic")
    flags.add_argument("--minutes", type=float, default=15, help="of traffic from each domain")
    flags.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    flags.add_argument("--questions", type=int, default=12, help="of each domain that only measure")
    flags.add_argument("--clients", type=int, default=2, help="that ask at the same time")
    flags.add_argument("--head", type=Path, help="the head to begin with; without, there is none at first")
    flags.add_argument("--picture", type=Path, help="a folder that gets the curve as .svg and .png")
    flags.add_argument("--fresh", type=int, default=2000, help="tokens after which a head is trained")
    flags.add_argument("--training", type=float, default=1.0, help="minutes of a training")
    options = flags.parse_args(arguments)
    data = data_folder()
    if data is None:
        print("The data folder is missing: set LICHEN_DATA.", file=sys.stderr)
        return 1
    try:
        record = asyncio.run(_measure(options, _domains(data, options.questions)))
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    if options.picture is not None:
        from bench.pictures import draw_learning

        draw_learning(record, options.picture)
    summary = record["summary"]
    for line in record["verdicts"]:
        print(("reached: " if line["reached"] else "MISSED: ") + line["aim"] + f" ({line['value']:.3f})")
    print(json.dumps({"bench": "distillation", "result": path.name, "summary": summary}))
    return 0 if record["status"] == "ok" else 1


def _domains(data: Path, held_out: int) -> list[Domain]:
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    school = [str(json.loads(line)["question"]) for line in lines]
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        bank = [f"A bank's customer writes: {row['text']} Answer them." for row in csv.DictReader(file)]
    step = len(bank) // 2003  # the file is sorted by intent
    bank = [bank[at * step * 7 % len(bank)] for at in range(2000)]
    found = []
    for name, questions in zip(DOMAINS, (school, bank), strict=True):
        found.append(Domain(name, questions[:held_out], itertools.cycle(questions[held_out:])))
    return found


async def _measure(options: argparse.Namespace, domains: list[Domain]) -> dict[str, Any]:
    model = model_file(options.model)
    record: dict[str, Any] = {
        "kind": "distillation",
        "status": "ok",
        "birth": certificate(model),
        "settings": {
            name: getattr(options, name)
            for name in ("threads", "minutes", "tokens", "questions", "clients", "fresh", "training")
        },
        "settings_head": None if options.head is None else options.head.name,
        "servers": {},
        "runs": [],
        "curve": [],
        "speed": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        held_out = [await _answers(model, home / str(at), one, options) for at, one in enumerate(domains)]
        speculation = SpeculationOptions(
            drafters="head", home=home, draft_head=options.head, distil_limit=100_000_000
        )
        served = await asyncio.to_thread(_load, model, options, speculation)
        try:
            learning = served.learning
            assert learning is not None, "it was asked to learn"
            learning.fresh, learning.minutes = options.fresh, options.training
            await _phases(served, learning, domains, held_out, options, record)
            version = learning.store.version
            record["learning"] = {
                name: getattr(learning, name) for name in ("trainings", "swaps", "rollbacks")
            }
        finally:
            await asyncio.to_thread(served.close)
        again = await asyncio.to_thread(
            _load, model, options, msgspec.structs.replace(speculation, draft_head=None)
        )
        record["restart"] = _restarted(again, held_out, version)
        await asyncio.to_thread(again.close)
    close_certificate(record["birth"])
    conclude(record)
    return record


def _restarted(again: ServedModel, held_out: list[list[Run]], version: int) -> dict[str, Any]:
    """What a model that was loaded again serves. version: of the head before."""
    assert again.learning is not None, "it was asked to learn"
    grades = _grades(again.learning.store.current(), held_out)
    found = {"version": again.learning.store.version, "version_before": version, "acceptance": grades}
    print(json.dumps({"restart": found}), file=sys.stderr, flush=True)
    return found


def _load(model: Path, options: argparse.Namespace, speculation: SpeculationOptions) -> ServedModel:
    settings = ModelOptions(
        context=2048, slots=options.clients + 1, threads=options.threads, speculation=speculation
    )
    return ServedModel.load(model, name="model", sha256="", options=settings)


async def _answers(model: Path, folder: Path, domain: Domain, options: argparse.Namespace) -> list[Run]:
    """Answers to the questions that only measure."""
    speculation = SpeculationOptions(states=folder, distil_limit=1_000_000_000)
    served = await asyncio.to_thread(_load, model, options, speculation)
    for question in domain.held_out:
        await (await _ask(served, question, options, kept=True)).text()
    await asyncio.to_thread(served.close)
    hidden, vocabulary = model_sizes(model)
    return list(read_segments(segment_files(folder), hidden=hidden, vocabulary=vocabulary))


async def _ask(
    served: ServedModel,
    question: str,
    options: argparse.Namespace,
    *,
    drafts: bool = True,
    kept: bool = False,
) -> Generation:
    wanted = SamplingOptions(temperature=0, max_tokens=options.tokens, speculation=drafts)
    (generation,) = await served.chat([{"role": "user", "content": question}], wanted, kept=kept)
    return generation


async def _phases(
    served: ServedModel,
    learning: HeadLearning,
    domains: list[Domain],
    held_out: list[list[Run]],
    options: argparse.Namespace,
    record: dict[str, Any],
) -> None:
    """Speed of all domains; then for each domain its traffic, and the speed of all again."""
    began = time.monotonic()
    fresh = learning.store.current()
    await _speeds(served, domains, options, record, "fresh", fresh)
    for domain in domains:
        stop = time.monotonic() + options.minutes * 60
        clients = [
            asyncio.ensure_future(_client(served, domain, options, stop, record))
            for _ in range(options.clients)
        ]
        version = -1
        while time.monotonic() < stop:
            if learning.store.version != version:
                version = learning.store.version
                head = learning.store.current()
                grades = await asyncio.to_thread(_grades, head, held_out)
                point = {"minutes": round((time.monotonic() - began) / 60, 2), "traffic": domain.name}
                record["curve"].append({**point, "version": version, "acceptance": grades})
                print(json.dumps(record["curve"][-1]), file=sys.stderr, flush=True)
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*clients)
        grades = await asyncio.to_thread(_grades, learning.store.current(), held_out)
        point = {"minutes": round((time.monotonic() - began) / 60, 2), "traffic": domain.name}
        record["curve"].append({**point, "version": learning.store.version, "acceptance": grades})
        await _speeds(served, domains, options, record, f"after {domain.name}", fresh)


def _grades(head: DraftHead | None, held_out: list[list[Run]]) -> dict[str, list[float]]:
    """Domain -> acceptance by position."""
    found: dict[str, list[float]] = {}
    for name, runs in zip(DOMAINS, held_out, strict=True):
        measured = None if head is None else grade(head, runs, step_s=0.01)
        found[name] = [0.0, 0.0, 0.0] if measured is None else list(measured.acceptance)
    return found


async def _client(
    served: ServedModel, domain: Domain, options: argparse.Namespace, stop: float, record: dict[str, Any]
) -> None:
    """Ask one question after the other; note the gaps between tokens, apart while a head is trained."""
    learning = served.learning
    assert learning is not None, "it was asked to learn"
    gaps = record.setdefault("gaps", {"learning": [], "quiet": []})
    for question in domain.traffic:
        if time.monotonic() > stop:
            return
        last = 0.0
        async for event in await _ask(served, question, options, kept=True):
            if isinstance(event, Piece):
                now = time.perf_counter()
                if last:
                    gaps["learning" if learning.training else "quiet"].append(now - last)
                last = now


async def _speeds(
    served: ServedModel,
    domains: list[Domain],
    options: argparse.Namespace,
    record: dict[str, Any],
    when: str,
    fresh: DraftHead | None,
) -> None:
    """Tokens a second of each domain's own questions, one client: without drafts, with the head that it began
    with, and with the one that there is, in turn."""
    learning = served.learning
    assert learning is not None, "it was asked to learn"
    while learning.training:  # noqa: ASYNC110 - a thread's; its end would swap another head in
        await asyncio.sleep(0.5)
    drafter = next(one for one in served.engine.speculation.drafters if isinstance(one, HeadDrafter))
    now = drafter.head
    for domain in domains:
        seconds, tokens = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0)
        guessed = right = 0
        for number, question in enumerate(domain.held_out):
            turn = number % len(SIDES)
            for side in SIDES[turn:] + SIDES[:turn]:
                head = fresh if side == "fresh" else now
                served.engine.call(functools.partial(drafter.swap, head))
                generation = await _ask(served, question, options, drafts=side != "plain")
                await generation.text()
                assert generation.finished is not None, "the text is complete"
                timings = generation.finished.timings
                seconds[side] += timings.decode_s
                tokens[side] += generation.finished.usage.completion_tokens - 1
                if side == "drafted":
                    guessed, right = guessed + timings.draft_n, right + timings.draft_n_accepted
        served.engine.call(functools.partial(drafter.swap, now))
        rates = {side: round(tokens[side] / max(seconds[side], 1e-9), 2) for side in seconds}
        record["speed"].append(
            {"when": when, "domain": domain.name, **rates, "draft_n": guessed, "draft_n_accepted": right}
        )
        print(json.dumps(record["speed"][-1]), file=sys.stderr, flush=True)


def conclude(record: dict[str, Any]) -> None:
    """First guesses right at the start, at the end of each domain's traffic; gaps; ratios of speed; verdicts."""
    curve = record["curve"]
    first, second = DOMAINS
    turn = [point for point in curve if point["traffic"] == first]
    if not turn or len(turn) == len(curve):
        record["status"] = "failed"
    gaps = record.pop("gaps", {"learning": [], "quiet": []})
    p95 = {
        name: round(statistics.quantiles(values, n=20)[-1] * 1e3, 2) if len(values) > 20 else None
        for name, values in gaps.items()
    }
    record["gap_p95_ms"] = p95
    record["summary"] = {
        "fresh": {name: curve[0]["acceptance"][name][0] for name in DOMAINS} if curve else {},
        f"after {first}": {name: turn[-1]["acceptance"][name][0] for name in DOMAINS} if turn else {},
        f"after {second}": {name: curve[-1]["acceptance"][name][0] for name in DOMAINS} if curve else {},
        "ratios": {
            f"{one['when']}, {one['domain']}": round(one["drafted"] / one["plain"], 3)
            for one in record["speed"]
        },
        "gap_p95_ms": p95,
        "recovered_minutes": _recovered(curve, turn),
    }
    record["verdicts"] = _verdicts(record) if record["status"] == "ok" else []


def _recovered(curve: list[dict[str, Any]], turn: list[dict[str, Any]]) -> float | None:
    """Minutes after the change until the new domain's first guesses are as often right as the old one's were,
    but for NEAR; None where that did not come. turn: the points of the first domain's traffic."""
    if not turn:
        return None
    first, second = DOMAINS
    level = turn[-1]["acceptance"][first][0] - NEAR
    if level <= 0:
        return None  # nothing was learned that could be lost
    for point in curve[len(turn) :]:
        if point["acceptance"][second][0] >= level:
            return round(float(point["minutes"] - turn[-1]["minutes"]), 2)
    return None


def _verdicts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, what was measured, and whether that is enough."""
    first = DOMAINS[0]
    summary, p95, restart = record["summary"], record["gap_p95_ms"], record["restart"]
    after = f"after {first}"
    speed = next(one for one in record["speed"] if (one["when"], one["domain"]) == (after, first))
    learned = summary[after][first] - summary["fresh"][first]
    recovered, minutes = summary["recovered_minutes"], record["settings"]["minutes"]
    lines = [
        ("first guesses right: at least 0.15 more", learned, learned >= 0.15),
        (
            "tokens/s beside the first head: more",
            speed["drafted"] / speed["fresh"],
            speed["drafted"] > speed["fresh"],
        ),
        (
            f"minutes after a change of domain: at most {minutes:g}",
            float("nan") if recovered is None else recovered,
            recovered is not None and recovered <= minutes,
        ),
        (
            "version after a restart: the one before",
            float(restart["version"]),
            restart["version"] == restart["version_before"],
        ),
    ]
    if p95["learning"] and p95["quiet"]:
        ratio = p95["learning"] / p95["quiet"]
        lines.append(("p95 of gaps while it learns: at most 1.3 x", ratio, ratio <= 1.3))
    return [{"aim": aim, "value": round(value, 4), "reached": reached} for aim, value, reached in lines]


if __name__ == "__main__":
    sys.exit(main())
