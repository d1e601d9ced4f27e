"""`python -m bench.speculation`: the same answers with and without drafted tokens, one client.

One daemon with speculation on; each question is asked twice in a row, once with `"speculation": false`, the
order changing from question to question, so that both sides see the same machine, and once before, so that
both find its prompt computed. What counts is the daemon's own rate of tokens 2..n of each answer, and the sum
of these times over a kind of work. Answers are greedy, so both sides say the same but for near-ties; how many
did is in the result. No question is asked twice with drafts, so past answers help no more than they would.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import peer as peers
from bench.certificate import certificate, close_certificate, model_file, save
from bench.copying import copying
from bench.flags import model_flags
from bench.peer import Peer, Settings
from bench.prompts import data_folder
from bench.server import ProcessorWatch, Server, free_port, run_to_end, running
from bench.stream import exchange, request_bytes
from bench.structured import answer_of
from bench.table import aligned, speculation_rows
from lichen.errors import LichenError

ROUTE = "/v1/chat/completions"
REQUEST_LIMIT_S = 240.0
LONGEST = 3000  # characters of a question
SIDES = ("plain", "drafted")
# Spec-Bench's tasks; its other categories are the eight of MT-Bench.
OWN = ("math_reasoning", "qa", "rag", "summarization", "translation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when anything failed."""
    flags = model_flags("speculation", "drafted tokens or none")
    flags.add_argument("--drafters", default="suffix", choices=("auto", "suffix", "model"))
    flags.add_argument("--draft-model", help="a GGUF file, for --drafters model or auto")
    flags.add_argument("--questions", type=int, default=8, help="of each kind of work")
    flags.add_argument("--kind", action="append", default=[], help="only these kinds; may repeat")
    flags.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    flags.add_argument("--budget", type=float, default=10, help="minutes; no question is asked after them")
    flags.add_argument("--context", type=int, default=2048)
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(speculation_rows(record), left=1))
    ratios = {kind: cell["ratio"] for kind, cell in record["summary"].items()}
    print(json.dumps({"bench": "speculation", "result": path.name, "ratios": ratios}))
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


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    lichen = _speculating(options)
    settings = Settings(
        model=model, threads=options.threads, slots=1, context=options.context, port=free_port()
    )
    work = questions(data_folder(), options.questions)
    if options.kind:
        work = {kind: bodies for kind, bodies in work.items() if kind in options.kind}
    record: dict[str, Any] = {
        "kind": "speculation",
        "status": "ok",
        "birth": certificate(model),
        "settings": {name: getattr(options, name) for name in ("threads", "context", "tokens", "questions")},
        "servers": {"lichen": {"command": lichen.shown_command(settings), **lichen.identity()}},
        "runs": [],
    }

    async def measure() -> None:
        async with running(lichen, settings) as server:
            await _ask(server, {"messages": [{"role": "user", "content": "Count to forty."}]}, 64, "plain")
            with ProcessorWatch(server.process.pid) as processor:
                await _alternate(server, work, options, record["runs"])
            record["foreign_cores"] = round(processor.foreign_cores, 3)

    run_to_end(measure())
    close_certificate(record["birth"])
    conclude(record)
    return record


def _speculating(options: argparse.Namespace) -> Peer:
    """lichen with drafters on, and nothing remembered from an earlier run."""
    plain = peers.load("lichen")
    more = ["--speculation", options.drafters, "--answer-memory", "0"]
    if options.draft_model:
        more += ["--draft-model", options.draft_model]
    return dataclasses.replace(plain, arguments=lambda settings: [*plain.arguments(settings), *more])


async def _alternate(
    server: Server,
    work: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace,
    entries: list[dict[str, Any]],
) -> None:
    """A question of each kind in turn, so that a budget that ends early cuts all kinds alike."""
    began = time.monotonic()
    rounds = itertools.zip_longest(*([(kind, body) for body in bodies] for kind, bodies in work.items()))
    for number, one in enumerate(entry for turn in rounds for entry in turn if entry is not None):
        if time.monotonic() - began > options.budget * 60:
            print(f"the budget of {options.budget:g} minutes ends after {number} questions", file=sys.stderr)
            return
        kind, body = one
        entry: dict[str, Any] = {"question": number, "work": kind}
        await _ask(server, body, 1, "plain")  # both sides continue the same computed prompt
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            entry[side] = await _ask(server, body, options.tokens, side)
        entry["same"] = entry["plain"].pop("text") == entry["drafted"].pop("text")
        entries.append(entry)
        print(json.dumps(entry), file=sys.stderr, flush=True)


async def _ask(server: Server, body: dict[str, Any], tokens: int, side: str) -> dict[str, Any]:
    whole = {**body, "temperature": 0, "max_tokens": tokens, "speculation": side == "drafted"}
    request = request_bytes(server.settings.port, ROUTE, whole)
    answer = answer_of(await exchange(server.settings.port, request, timeout=REQUEST_LIMIT_S))
    timings = answer["timings"]
    return {
        "tokens": answer["usage"]["completion_tokens"],
        "decode_ms": timings["decode_ms"],
        "tokens_per_second": timings["tokens_per_second"],
        "draft_n": timings["draft_n"],
        "draft_n_accepted": timings["draft_n_accepted"],
        "text": answer["choices"][0]["message"]["content"],
    }


def conclude(record: dict[str, Any]) -> None:
    """For each kind and for all: rates over all its tokens, their ratio, and the range of single ratios."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in record["runs"]:
        if min(entry[side]["tokens"] for side in SIDES) > 8:  # a rate of few tokens is mostly noise
            kinds.setdefault(entry["work"], []).append(entry)
            kinds.setdefault("all", []).append(entry)
    record["summary"] = {kind: _cell(kinds[kind]) for kind in sorted(kinds, key=lambda name: name == "all")}
    if not kinds:
        record["status"] = "failed"


def _cell(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def rate(side: str) -> float:
        seconds = sum(entry[side]["decode_ms"] for entry in entries) / 1e3
        return float(sum(entry[side]["tokens"] - 1 for entry in entries) / seconds)

    ratios = [
        entry["drafted"]["tokens_per_second"] / entry["plain"]["tokens_per_second"] for entry in entries
    ]
    drafted = sum(entry["drafted"]["draft_n"] for entry in entries)
    accepted = sum(entry["drafted"]["draft_n_accepted"] for entry in entries)
    tokens = sum(entry["drafted"]["tokens"] for entry in entries)
    return {
        "answers": len(entries),
        "same": sum(entry["same"] for entry in entries),
        "plain_tokens_per_second": round(rate("plain"), 2),
        "drafted_tokens_per_second": round(rate("drafted"), 2),
        "ratio": round(rate("drafted") / rate("plain"), 4),
        "median_ratio": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "accepted": round(accepted / drafted, 4) if drafted else None,
        "tokens_a_step": round(tokens / max(1, tokens - accepted), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
