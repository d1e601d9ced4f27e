"""`python -m bench.soak`: an hour of mixed load on one daemon; what grows, and what is left behind.

Before the clock starts every slot is filled to its end, so that the KV cache's pages are resident and
do not count as growth. Exit code 1 when memory drifts by more than the limit, when anything is left behind
(tasks, busy slots, requests without an end), or when an answer was not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench import peer as peers
from bench.certificate import certificate, close_certificate, model_file
from bench.command import carry_out
from bench.mix import ANSWER_LIMIT_S, fault, times, work
from bench.numbers import percentile
from bench.peer import BenchError, Settings
from bench.server import Server, free_port, run_to_end, running
from bench.stream import StreamError, exchange, parse_response, request_bytes
from bench.table import aligned, soak_rows
from lichen.devices.probe import probe

FAULTS_KEPT = 20
IDLE_LIMIT_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table and one JSON line, write the result."""
    flags = argparse.ArgumentParser(prog="python -m bench.soak", description="hours of mixed load")
    flags.add_argument("--model", default="smollm2-135m", help="a GGUF file, or a model of lichen's store")
    flags.add_argument("--minutes", type=float, default=60)
    flags.add_argument("--every", type=float, default=60, help="seconds between two looks at the daemon")
    flags.add_argument("--clients", type=int, default=6)
    flags.add_argument("--limit", type=float, default=3, help="per cent that its memory may drift")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--threads", type=int, default=probe().physical_cores)
    flags.add_argument("--slots", type=int, default=4)
    flags.add_argument("--context", type=int, default=2048, help="tokens of one client")
    flags.add_argument("--no-save", action="store_true", help="write no result")
    options = flags.parse_args(arguments)
    told = ("status", "requests", "left_behind", "faults", "drift")
    return carry_out(
        "soak",
        options,
        _measure,
        tables=lambda record: [aligned(soak_rows(record), left=1)],
        line=lambda record: {key: record[key] for key in told},
    )


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    lichen = peers.load("lichen")
    settings = Settings(
        model=model, threads=options.threads, slots=options.slots, context=options.context, port=free_port()
    )
    kept = ("minutes", "every", "clients", "limit", "seed", "threads", "slots", "context")
    record: dict[str, Any] = {
        "kind": "soak",
        "status": "ok",
        "birth": certificate(model),
        "settings": {name: getattr(options, name) for name in kept},
        "servers": {"lichen": {"command": lichen.shown_command(settings), **lichen.identity()}},
        "runs": [],
    }

    async def measure() -> None:
        async with running(lichen, settings) as server:
            await _Soak(server, options, record).run()

    run_to_end(measure())
    close_certificate(record["birth"])
    conclude(record)
    return record


class _Soak:
    """Clients and an observer of one daemon."""

    def __init__(self, server: Server, options: argparse.Namespace, record: dict[str, Any]) -> None:
        self._port = server.settings.port
        self._settings = server.settings
        self._options = options
        self._record = record
        self._counts: Counter[str] = Counter()
        self._faults: list[str] = []
        self._ttft: list[float] = []
        self._gaps: list[float] = []

    async def run(self) -> None:
        """Fill the slots, load the daemon for the given time, and say what is left."""
        await self._fill()
        before = await self._idle()
        ends = time.monotonic() + self._options.minutes * 60
        observer = asyncio.ensure_future(self._observe(ends))
        await asyncio.gather(*(self._client(number, ends) for number in range(self._options.clients)))
        await observer
        after = await self._idle()
        engine = after["counters"]
        ended = sum(engine[name] for name in ("completed", "cancelled", "failed"))
        self._record["requests"] = dict(sorted(self._counts.items()))
        self._record["faults"] = self._faults
        self._record["left_behind"] = {
            "tasks": after["tasks"] - before["tasks"],
            "busy slots": after["slots"]["busy"],
            "requests without an end": engine["requests"] - ended,
        }

    async def _fill(self) -> None:
        """One prompt for each slot that leaves no cell of it unused."""
        length = self._settings.context - 8

        async def fill(first: int) -> None:
            body = {"prompt": [1000 + first] * length, "max_tokens": 4}
            request = request_bytes(self._port, "/v1/completions", body)
            record = await exchange(self._port, request, timeout=ANSWER_LIMIT_S)
            if record.error is not None or parse_response(record.arrivals).status != 200:
                raise BenchError(f"The slots could not be filled: {record.error or record.arrivals[-1][1]!r}")

        await asyncio.gather(*(fill(slot) for slot in range(self._settings.slots)))

    async def _client(self, number: int, ends: float) -> None:
        chance = random.Random(f"{self._options.seed} {number}")
        while time.monotonic() < ends:
            asked = work(self._port, self._settings.context, chance)
            record = await exchange(self._port, asked.request, timeout=asked.seconds)
            self._counts[asked.kind] += 1
            if (found := fault(asked, record)) and len(self._faults) < FAULTS_KEPT:
                self._faults.append(found)
            if measured := times(asked, record):
                self._ttft.append(measured[0])
                self._gaps += measured[1]
            await asyncio.sleep(chance.uniform(0, 0.1))

    async def _observe(self, ends: float) -> None:
        while (left := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self._options.every))
            status = await self._status()
            ttft, self._ttft = self._ttft, []
            gaps, self._gaps = self._gaps, []
            self._record["runs"].append(
                {
                    "status": "ok",
                    "rss_mb": round(status["rss_bytes"] / 1e6, 2),
                    "tasks": status["tasks"],
                    "free_slots": status["counters"]["free_slots"],
                    "cells": status["kv"]["cells_used"],
                    "ttft_p95_ms": _p95(ttft),
                    "gap_p95_ms": _p95(gaps),
                    "streams": len(ttft),
                }
            )
            print(self._record["runs"][-1], file=sys.stderr, flush=True)

    async def _status(self) -> dict[str, Any]:
        record = await exchange(self._port, request_bytes(self._port, "/status"), timeout=10)
        try:
            status: dict[str, Any] = json.loads(parse_response(record.arrivals).body)
        except (StreamError, ValueError) as error:
            raise BenchError(f"The daemon does not say its status: {record.error or error}") from error
        return status

    async def _idle(self) -> dict[str, Any]:
        """The status once nothing runs or waits, or after a while all the same."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        while True:
            status = await self._status()
            counters = status["counters"]
            if (not counters["running"] and not counters["waiting"]) or time.monotonic() > deadline:
                await asyncio.sleep(0.3)  # handlers of closed connections end just after their sequences
                return await self._status()
            await asyncio.sleep(0.1)


def _p95(seconds: Sequence[float]) -> float | None:
    return round(percentile(seconds, 95) * 1e3, 2) if seconds else None


def conclude(record: dict[str, Any]) -> None:
    """First quarter beside last, and the verdict. The first tenth of the looks is warming up."""
    looks = record["runs"][max(1, len(record["runs"]) // 10) :] or record["runs"]
    quarter = max(1, len(looks) // 4)
    metrics = {
        "resident memory, MB": "rss_mb",
        "tasks": "tasks",
        "cells": "cells",
        "TTFT p95, ms": "ttft_p95_ms",
        "gap p95, ms": "gap_p95_ms",
    }
    record["drift"] = {}
    for title, key in metrics.items():
        first, last = (_median(part, key) for part in (looks[:quarter], looks[-quarter:]))
        change = None if first is None or last is None or not first else round(last / first - 1, 4)
        record["drift"][title] = {"first": first, "last": last, "change": change}
    grown = record["drift"]["resident memory, MB"]["change"]
    too_much = grown is None or grown * 100 > record["settings"]["limit"]
    if too_much or any(record["left_behind"].values()) or record["faults"]:
        record["status"] = "failed"


def _median(looks: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [look[key] for look in looks if look[key] is not None]
    return round(statistics.median(values), 2) if values else None


if __name__ == "__main__":
    sys.exit(main())
