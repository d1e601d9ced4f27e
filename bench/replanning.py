"""`python -m bench.replanning`: a trace of changing load on a daemon that replans, beside daemons that do not.

    quiet     one user with short questions
    crowd     sixteen users
    long      three users with prompts of about 1,000 tokens
    pressure  six users, while another program takes all memory that is left (`bench/neighbour.py`)

Every server gets the same requests at the same moments (`bench/trace.py`), one server after another. Counted are requests
that miss a limit: seconds to the first token, mean seconds between two, and under pressure the bytes of the server;
and those that got no whole answer. How fast the crowd asks and the limits follow from what this machine's best plan
is predicted to do, unless they are given. The fixed plans are those that are best for the crowd and for the pressure.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench.certificate import certificate, close_certificate, model_file
from bench.command import carry_out
from bench.flags import model_flags
from bench.measure import warm_up
from bench.numbers import median, percentile, rounded
from bench.peer import ROOT, SHOWN_PORT, BenchError, Peer, Settings
from bench.planned import (
    HOME,
    Prepared,
    described,
    intent_peer,
    llama_default,
    plan_peer,
    plan_words,
    prepare,
    status_of,
)
from bench.prompts import PromptBook, data_folder
from bench.replanning_tables import conclude, phase_rows, server_rows
from bench.server import ProcessorWatch, Server, free_port, run_to_end, running
from bench.table import aligned
from bench.trace import Asked, Limits, Phase, at_moment, count, judge, play
from lichen.devices.intent import Intent, Objectives
from lichen.devices.load import Load
from lichen.devices.plan import Space, choose
from lichen.devices.probe import memory_left
from lichen.devices.verdict import Candidate
from lichen.planning import process_bytes
from lichen.quant.gguf_check import check_gguf

BUSY = 0.7  # of what the best plan can do: how much the crowd asks for
ROOM = 1.5  # times what the best plan is predicted to take: the limits
SHARE = 0.9  # of what the crowd's plan holds: the memory under pressure
WATCH_S = 0.25
SETTLES_S = 120.0  # that the neighbour may take for the memory

Turn = tuple[Peer, Path, int]  # a server, the file that it is given, and its threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and one JSON line, write the result. 1 when anything failed."""
    options = _flags().parse_args(arguments)
    if options.quick:
        options.scale, options.neighbour = min(options.scale, 0.1), False
    return carry_out(
        "replanning",
        options,
        _measure_all,
        tables=lambda record: [aligned(phase_rows(record)), aligned(server_rows(record), left=1)],
        line=lambda record: {key: record[key] for key in ("status", "ratios", "dropped")},
    )


def _flags() -> argparse.ArgumentParser:
    flags = model_flags("replanning", "a changing load, with replanning and without")
    flags.add_argument("--context", type=int, default=2048, help="tokens of a conversation")
    flags.add_argument("--intent", default="balanced")
    flags.add_argument("--ttft", type=float, default=0, help="limit in seconds; 0: from predictions")
    flags.add_argument("--itl", type=float, default=0, help="limit in seconds; 0: from predictions")
    flags.add_argument("--scale", type=float, default=1.0, help="of the length of all phases")
    flags.add_argument(
        "--neighbour",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the machine's memory in the last phase: only where nobody else needs it",
    )
    flags.add_argument("--leave", type=int, default=300_000_000, help="bytes that the neighbour leaves")
    flags.add_argument("--home", type=Path, default=HOME, help="where layouts and fingerprints are kept")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument(
        "--quick", action="store_true", help="short phases without a neighbour: no plan can change"
    )
    flags.add_argument("--publish", action="store_true", help="also write the table of docs/")
    return flags


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    birth = certificate(model)
    prepared = prepare(model, options.home, again=not options.quick)
    picks = _Picks(prepared, options)
    phases, limits = picks.phases(options.scale), picks.limits()
    turns = picks.servers(phases, limits)
    record: dict[str, Any] = {
        "kind": "replanning",
        "status": "ok",
        "birth": birth,
        "settings": {
            name: getattr(options, name)
            for name in ("threads", "context", "seed", "quick", "scale", "neighbour")
        },
        "limits": {name: rounded(getattr(limits, name), 4) for name in ("ttft", "itl", "memory")},
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "servers": {
            peer.name: described(peer, _settings(options, path, threads, SHOWN_PORT), options.home)
            for peer, path, threads in turns
        },
        "starts": [],
        "runs": [],
    }
    run_to_end(_all_servers(options, turns, phases, limits, record))
    close_certificate(record["birth"])
    conclude(record)
    return record


class _Picks:
    """What follows from predictions: the load, the limits, and the plans that are tried."""

    def __init__(self, prepared: Prepared, options: argparse.Namespace) -> None:
        self._prepared, self._options = prepared, options
        self._space = Space(
            context=options.context,
            cores=options.threads,
            divergence=prepared.kl,
            memory=process_bytes(check_gguf(prepared.asked.path)),
        )
        self._crowd = self._pick(Phase(name="crowd", users=16).load(), "throughput")

    def _pick(self, load: Load, intent: Intent, memory: int | None = None) -> Candidate:
        curves = list(self._prepared.fingerprints.values())
        objectives = Objectives(memory=memory)
        return choose(curves, load, intents=[intent], objectives=objectives, space=self._space).pick

    def phases(self, scale: float) -> list[Phase]:
        """The trace; the crowd asks for `BUSY` of what its best plan gives."""
        period = round(16 * 64 / (BUSY * self._crowd.prediction.rate), 1)
        alone = self._pick(Phase(name="long", users=1, prompt="long").load(), "latency").prediction
        reading = round(3 * (alone.ttft + 64 * alone.itl) / BUSY, 1)
        return [
            Phase(name="quiet", users=1, period=3.0, seconds=35 * scale),
            Phase(name="crowd", users=16, period=period, seconds=95 * scale),
            Phase(name="long", users=3, prompt="long", period=reading, seconds=65 * scale),
            Phase(name="pressure", users=6, period=0.75 * period, seconds=85 * scale, pressed=True),
        ]

    def limits(self) -> Limits:
        """`ROOM` for what the best plans are predicted to take."""
        long = self._pick(Phase(name="long", users=3, prompt="long").load(), "latency").prediction
        return Limits(
            ttft=self._options.ttft or round(ROOM * long.ttft, 2),
            itl=self._options.itl or round(ROOM * self._crowd.prediction.itl, 4),
            memory=round(SHARE * self._crowd.prediction.memory),
        )

    def servers(self, phases: Sequence[Phase], limits: Limits) -> list[Turn]:
        """lichen that replans, lichen with fixed plans, and llama-server."""
        options, model = self._options, self._prepared.asked.path
        wanted = f"ttft={limits.ttft:.6f}s, itl={limits.itl:.6f}s, users=4, prompt=60, answer=64"
        turns: list[Turn] = [
            (
                intent_peer("replanning", options.intent, wanted, options.context, options.home),
                model,
                options.threads,
            )
        ]
        pressed = self._pick(phases[-1].load(), "throughput", limits.memory)
        plans = list(dict.fromkeys(one.plan for one in (self._crowd, pressed)))
        for number, plan in enumerate(plans):
            peer = plan_peer(f"fixed_{number + 1}", plan, options.home)
            turns.append((peer, self._prepared.files[plan.layout], plan.threads))
            print(f"fixed plan {number + 1}: {plan_words(plan)}", file=sys.stderr, flush=True)
        return [*turns, (llama_default(), model, options.threads)]


def _settings(options: argparse.Namespace, path: Path, threads: int, port: int) -> Settings:
    return Settings(model=path, threads=threads, slots=4, context=options.context, port=port)


async def _all_servers(
    options: argparse.Namespace,
    turns: Sequence[Turn],
    phases: Sequence[Phase],
    limits: Limits,
    record: dict[str, Any],
) -> None:
    for peer, path, threads in turns:
        start: dict[str, Any] = {"server": peer.name, "status": "ok", "error": None}
        record["starts"].append(start)
        book = PromptBook(data_folder(), seed=options.seed)
        try:
            async with running(peer, _settings(options, path, threads, free_port())) as server:
                start["ready_s"] = round(server.ready_s, 3)
                await warm_up(server)
                async with _watched(server) as samples:
                    for phase in phases:
                        run = await _one_phase(options, server, phase, book, limits, samples)
                        record["runs"].append(run)
                        print(_line(run), file=sys.stderr, flush=True)
                start["said"] = [
                    line for line in server.tail(20_000).splitlines() if line.startswith("Plan changed")
                ]
        except BenchError as error:
            start.update(status="failed", error=str(error))
            print(f"{peer.title}: {error}", file=sys.stderr, flush=True)


async def _one_phase(
    options: argparse.Namespace,
    server: Server,
    phase: Phase,
    book: PromptBook,
    limits: Limits,
    samples: list[tuple[float, int]],
) -> dict[str, Any]:
    extras = dict(server.peer.extras)
    with ProcessorWatch(server.process.pid) as processor:
        async with _pressure(options, phase):
            asked = await play(server.settings.port, phase, book, extras, seed=options.seed)
    plan = (await status_of(server))["plan"] if server.peer.home == "lichen" else None
    return {
        "server": server.peer.name,
        "phase": phase.name,
        "status": "ok" if server.process.poll() is None else "failed",
        "foreign_cores": round(processor.foreign_cores, 3),
        "plan": None
        if plan is None
        else {key: plan[key] for key in ("layout", "slots", "threads", "chunk", "changes")},
        **judged_phase(asked, limits, samples, pressed=phase.pressed),
    }


def judged_phase(
    asked: Sequence[Asked], limits: Limits, samples: Sequence[tuple[float, int]], *, pressed: bool
) -> dict[str, Any]:
    """Counts of violations, and times in ms. samples: moments and the server's bytes."""
    held = (lambda moment: at_moment(samples, moment)) if pressed else None
    found = [judge(one, limits, held) for one in asked]
    firsts = [one.ttft * 1e3 for one in found if one.ttft is not None]
    gaps = [one.itl * 1e3 for one in found if one.itl is not None]
    since = min(one.due for one in asked)
    return {
        **count(found),
        "ttft_p50_ms": rounded(median(firsts), 1),
        "ttft_p95_ms": round(percentile(firsts, 95), 1) if firsts else None,
        "itl_p50_ms": rounded(median(gaps), 2),
        "rss_mb": round(max((size for at, size in samples if at >= since), default=0) / 1e6, 1),
    }


@asynccontextmanager
async def _watched(server: Server) -> AsyncIterator[list[tuple[float, int]]]:
    """Moments and resident bytes of a server, as they come."""
    samples: list[tuple[float, int]] = []
    process = psutil.Process(server.process.pid)

    async def look() -> None:
        while True:
            samples.append((time.monotonic(), process.memory_info().rss))
            await asyncio.sleep(WATCH_S)

    looking = asyncio.create_task(look())
    try:
        yield samples
    finally:
        looking.cancel()
        await asyncio.wait({looking})


@asynccontextmanager
async def _pressure(options: argparse.Namespace, phase: Phase) -> AsyncIterator[None]:
    """The neighbour, where a phase has one, from when it has what it wants: taking the memory makes a core
    busy for longer or shorter, whoever serves."""
    if not (phase.pressed and options.neighbour):
        yield
        return
    words = ["-m", "bench.neighbour", str(options.leave), str(psutil.virtual_memory().total)]
    process = subprocess.Popen(  # noqa: ASYNC220 - a fork of milliseconds
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ.copy(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + SETTLES_S
        while memory_left() > 1.5 * options.leave and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(WATCH_S)
        yield
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def _line(run: dict[str, Any]) -> str:
    plan = "" if run["plan"] is None else f" {msgspec.json.encode(run['plan']).decode()}"
    times = (
        f"TTFT {run['ttft_p50_ms']}/{run['ttft_p95_ms']} ms, ITL {run['itl_p50_ms']} ms, {run['rss_mb']} MB"
    )
    return (
        f"{run['server']:<14}{run['phase']:<10}{run['violations']:4} of {run['requests']:4} "
        f"(late {run['late']}, slow {run['slow']}, heavy {run['heavy']}, dropped {run['dropped']}) {times}{plan}"
    )


if __name__ == "__main__":
    sys.exit(main())
