"""`python -m bench.startup`: from spawning a server to its first healthy answer and its first token.

The model's file is read once before, so all start from a warm page cache. For lichen, one more start
under `-X importtime` says which packages the imports go to; it counts for nothing else, since the
flag itself slows imports down.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench import peer as peers
from bench.answer import AnswerError, read_answer
from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import server_flags
from bench.numbers import median, paired_ratio, rounded
from bench.peer import BenchError, Peer, Settings
from bench.scenarios import chat_request
from bench.server import free_port, run_to_end, running
from bench.stream import exchange
from bench.table import aligned, startup_rows
from lichen.errors import LichenError

PROBE_EVERY_S = 0.005
_IMPORT = re.compile(r"import time:\s*(\d+)\s*\|\s*(\d+)\s*\|\s*(\S+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when anything failed."""
    flags = server_flags("startup", "time until servers are ready", runs=5, context=4096, slots=4)
    flags.add_argument("--servers", default=",".join(peers.names()), help="which, separated by commas")
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(startup_rows(record), left=1))
    ratios = {name: ratio["ready_s"] for name, ratio in record["ratios"].items()}
    print(json.dumps({"bench": "startup", "result": path.name, "ratios": ratios}))
    return 0 if record["status"] == "ok" else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    servers = [peers.load(name) for name in options.servers.split(",")]
    settings = Settings(
        model=model, threads=options.threads, slots=options.slots, context=options.context, port=0
    )
    record: dict[str, Any] = {
        "kind": "startup",
        "status": "ok",
        "birth": certificate(model),  # hashing reads the whole file: the page cache is warm from here on
        "settings": {name: getattr(options, name) for name in ("threads", "slots", "context")},
        "servers": {
            peer.name: {"title": peer.title, "command": peer.shown_command(settings), **peer.identity()}
            for peer in servers
        },
        "runs": [],
        "imports": None,
    }
    run_to_end(_alternate(options, servers, settings, record))
    close_certificate(record["birth"])
    _conclude(record)
    return record


async def _alternate(
    options: argparse.Namespace, servers: Sequence[Peer], settings: Settings, record: dict[str, Any]
) -> None:
    for run in range(options.runs):
        for peer in servers:
            entry: dict[str, Any] = {"run": run, "server": peer.name, "status": "ok", "error": None}
            record["runs"].append(entry)
            try:
                entry.update(await _start_once(peer, settings))
            except BenchError as error:
                entry.update(status="failed", error=str(error))
    if "lichen" in record["servers"]:
        record["imports"] = await _imports(peers.load("lichen"), settings)


def _on_free_port(settings: Settings) -> Settings:
    return Settings(
        model=settings.model,
        threads=settings.threads,
        slots=settings.slots,
        context=settings.context,
        port=free_port(),
    )


async def _start_once(peer: Peer, settings: Settings) -> dict[str, Any]:
    own = _on_free_port(settings)
    async with running(peer, own, probe_every=PROBE_EVERY_S) as server:
        asked = time.monotonic()
        record = await exchange(own.port, chat_request(own.port, "Say hello.", 1, peer.extras), timeout=60)
        try:
            answer = read_answer(record)
        except AnswerError as error:
            raise BenchError(f"{peer.title} cannot answer: {error}") from error
        return {
            "ready_s": round(server.ready_s, 4),
            "first_token_s": round(asked - server.spawned + answer.ttft, 4),
        }


async def _imports(lichen: Peer, settings: Settings) -> dict[str, Any]:
    async with running(lichen, _on_free_port(settings), python_flags=("-X", "importtime")) as server:
        return import_split(server.log.read_text(encoding="utf-8", errors="replace").splitlines())


def import_split(lines: Iterable[str], *, top: int = 15) -> dict[str, Any]:
    """Milliseconds of imports by top-level package (lichen's by sub-package), from `-X importtime` lines.

    Self times are added, so packages do not count each other's; times of two threads that import at
    once overlap, so the sum can exceed what passed on the clock.
    """
    spent: Counter[str] = Counter()
    modules = 0
    for line in lines:
        if found := _IMPORT.match(line):
            name = found[3]
            parts = name.split(".")
            spent[".".join(parts[:2]) if parts[0] == "lichen" else parts[0]] += int(found[1])
            modules += 1
    return {
        "modules": modules,
        "total_ms": round(sum(spent.values()) / 1e3, 1),
        "top_ms": {name: round(micros / 1e3, 1) for name, micros in spent.most_common(top)},
    }


def _conclude(record: dict[str, Any]) -> None:
    metrics = ("ready_s", "first_token_s")
    values: dict[str, dict[str, dict[int, float | None]]] = {
        name: {metric: {} for metric in metrics} for name in record["servers"]
    }
    for entry in record["runs"]:
        if entry["status"] != "ok":
            record["status"] = "failed"
            continue
        for metric in metrics:
            values[entry["server"]][metric][entry["run"]] = entry[metric]
    subject, *others = values
    record["summary"] = {
        name: {metric: rounded(median(runs.values()), 3) for metric, runs in own.items()}
        for name, own in values.items()
    }
    record["ratios"] = {
        other: {metric: paired_ratio(values[subject][metric], values[other][metric]) for metric in metrics}
        for other in others
    }


if __name__ == "__main__":
    sys.exit(main())
