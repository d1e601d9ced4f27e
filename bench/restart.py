"""`python -m bench.restart`: time to first token of a long prompt, cold, and after the daemon was restarted.

In each run a daemon with an empty home answers a question under a system prompt of about 2,000 tokens.
Then it is stopped as a service is, started again and asked another question under the same prompt; and
once more after `kill -9`. Last, a stream runs while the prompt is restored for a second client, and
another while a third client gets the same prompt out of a slot: the difference between their longest
pauses is what a restoration costs others. (Without tinyshakespeare the prompt has about 1,000 tokens.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import peer as peers
from bench.answer import Answer, AnswerError, read_answer
from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import server_flags
from bench.numbers import median, paired_ratio, rounded
from bench.peer import BenchError, Peer, Settings
from bench.prompts import PromptBook, data_folder
from bench.scenarios import chat_request
from bench.server import Server, free_port, run_to_end, running
from bench.stream import exchange
from bench.table import aligned, number
from lichen.errors import LichenError

STREAM_QUESTION = "Write a long story about a lighthouse and its keeper."
STREAM_TOKENS = 200
IDLE_S = 2.0  # long enough for an idle engine to have written what it holds
PHASES = ("cold", "restarted", "killed")
PLACES = {"beside_disk": "the disk", "beside_slot": "a slot"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when anything failed."""
    flags = server_flags(
        "restart", "first token of a long prompt after a restart", runs=3, context=4096, slots=4
    )
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(_rows(record), left=1))
    share = record["ratios"]["restarted"]
    print(json.dumps({"bench": "restart", "result": path.name, "ratios": {"restarted": share}}))
    return 0 if record["status"] == "ok" else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    settings = Settings(
        model=model, threads=options.threads, slots=options.slots, context=options.context, port=0
    )
    lichen = peers.load("lichen")
    record: dict[str, Any] = {
        "kind": "restart",
        "status": "ok",
        "birth": certificate(model),
        "settings": {name: getattr(options, name) for name in ("threads", "slots", "context")},
        "servers": {"lichen": {"title": lichen.title, **lichen.identity()}},
        "runs": [],
    }
    run_to_end(_all_runs(options.runs, lichen, settings, record))
    close_certificate(record["birth"])
    _conclude(record)
    return record


async def _all_runs(runs: int, lichen: Peer, settings: Settings, record: dict[str, Any]) -> None:
    book = PromptBook(data_folder(), seed=1)
    for run in range(runs):
        entry: dict[str, Any] = {"run": run, "status": "ok", "error": None}
        record["runs"].append(entry)
        prefix = f"{book.prefix()}\n\n{book.prefix()}"
        questions = [f"{prefix}\n\n{book.short()}" for _ in range(5)]
        with tempfile.TemporaryDirectory(prefix="lichen-bench-home-") as home:
            try:
                await _one_run(lichen, Path(home), settings, questions, entry)
            except BenchError as error:
                entry.update(status="failed", error=str(error))


async def _one_run(
    lichen: Peer, home: Path, settings: Settings, questions: Sequence[str], entry: dict[str, Any]
) -> None:
    lichen = _with_home(lichen, home)
    async with _started(lichen, settings) as server:
        entry["cold"] = _shown(await _ask(server, questions[0], 1))
    async with _started(lichen, settings) as server:
        entry["restarted"] = _shown(await _ask(server, questions[1], 1))
    entry["files"] = _forget_all(home)
    async with _started(lichen, settings) as server:
        await _ask(server, questions[0], 1)
        await asyncio.sleep(IDLE_S)
        os.kill(server.process.pid, signal.SIGKILL)
    async with _started(lichen, settings) as server:
        entry["killed"] = _shown(await _ask(server, questions[2], 1))
    async with _started(lichen, settings) as server:
        entry["beside_disk"] = await _beside_stream(server, questions[3])
        entry["beside_slot"] = await _beside_stream(server, questions[4])


async def _beside_stream(server: Server, question: str) -> dict[str, Any]:
    """Ask while a stream runs; how long the gaps of the stream are."""
    stream = asyncio.create_task(_ask(server, STREAM_QUESTION, STREAM_TOKENS))
    await asyncio.sleep(0.5)
    answer = await _ask(server, question, 1)
    gaps = (await stream).gaps
    return {
        **_shown(answer),
        "gap_p50_ms": rounded((median(gaps) or 0) * 1e3, 1),
        "gap_max_ms": round(max(gaps) * 1e3, 1),
    }


def _with_home(lichen: Peer, home: Path) -> Peer:
    """lichen with its prefix cache on, in a folder of its own."""

    def arguments(settings: Settings) -> list[str]:
        own = lichen.arguments(settings)
        at = own.index("serve")
        return [*own[:at], "--home", str(home), *own[at:], "--prefix-cache", "2 GB"]

    return replace(lichen, arguments=arguments)


def _forget_all(home: Path) -> dict[str, int]:
    """Remove the cache; how many files and bytes it had."""
    folder = home / "prefix-cache"
    sizes = [path.stat().st_size for path in folder.rglob("*.kv")]
    shutil.rmtree(folder, ignore_errors=True)
    return {"count": len(sizes), "bytes": sum(sizes)}


@asynccontextmanager
async def _started(lichen: Peer, settings: Settings) -> AsyncIterator[Server]:
    async with running(lichen, replace(settings, port=free_port())) as server:
        yield server


async def _ask(server: Server, text: str, max_tokens: int) -> Answer:
    port = server.settings.port
    record = await exchange(port, chat_request(port, text, max_tokens, server.peer.extras), timeout=120)
    try:
        return read_answer(record)
    except AnswerError as error:
        raise BenchError(f"{server.peer.title} cannot answer: {error}") from error


def _shown(answer: Answer) -> dict[str, Any]:
    return {
        "ttft_ms": round(answer.ttft * 1e3, 1),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
    }


def _conclude(record: dict[str, Any]) -> None:
    good = [entry for entry in record["runs"] if entry["status"] == "ok"]
    if len(good) < len(record["runs"]):
        record["status"] = "failed"
    times: dict[str, dict[int, float | None]] = {
        phase: {entry["run"]: entry[phase]["ttft_ms"] for entry in good} for phase in PHASES
    }
    record["summary"] = {phase: {"ttft_ms": rounded(median(own.values()), 1)} for phase, own in times.items()}
    for place in PLACES:
        record["summary"][place] = {
            metric: rounded(median(entry[place][metric] for entry in good), 1)
            for metric in ("ttft_ms", "gap_p50_ms", "gap_max_ms")
        }
    record["ratios"] = {phase: paired_ratio(times[phase], times["cold"]) for phase in PHASES[1:]}


def _rows(record: dict[str, Any]) -> list[list[str]]:
    rows = [["first token of a long prompt", "ms", "of cold"]]
    for phase in PHASES:
        share = (record["ratios"].get(phase) or {}).get("median")
        rows.append(
            [
                phase,
                number(record["summary"][phase]["ttft_ms"], 0),
                number(None if share is None else share * 100, 1, " %"),
            ]
        )
    for place, title in PLACES.items():
        cell = record["summary"][place]
        rows.append([f"beside a stream, from {title}", number(cell["ttft_ms"], 0), ""])
        rows.append(["  greatest gap of the stream", number(cell["gap_max_ms"], 0), ""])
    return rows


if __name__ == "__main__":
    sys.exit(main())
