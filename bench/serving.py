"""`python -m bench.serving`: lichen and its peers under the same load, one server at a time.

A run starts each server afresh, in turn, and takes it through all scenarios; the next run begins with
the next server, so that slow drift of the machine falls on all of them. Ratios are taken within a run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from bench import peer as peers
from bench.certificate import certificate, close_certificate, model_file
from bench.command import carry_out
from bench.flags import server_flags
from bench.measure import measure, warm_up
from bench.numbers import dig, median, paired_ratio, rounded
from bench.peer import BenchError, Peer, Settings
from bench.prompts import PromptBook, data_folder
from bench.scenarios import Prompts, Scenario, choose, write_prompts
from bench.server import free_port, run_to_end, running
from bench.table import aligned, serving_rows

METRICS: dict[str, tuple[str, ...]] = {
    "tokens_per_second": ("tokens_per_second",),
    "decode_tokens_per_second": ("decode_tokens_per_second",),
    "ttft_p50_ms": ("ttft_ms", "p50"),
    "ttft_p95_ms": ("ttft_ms", "p95"),
    "gap_p50_ms": ("gap_ms", "p50"),
    "gap_p95_ms": ("gap_ms", "p95"),
    "peak_rss_mb": ("peak_rss_mb",),
    "bandwidth_gb_s": ("bandwidth_gb_s",),
    "cold_ttft_ms": ("cold_ttft_ms",),
    "warm_ttft_share": ("warm_ttft_share",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line of ratios, write the result. 1 when anything failed."""
    options = _parse(arguments)
    return carry_out(
        "serving",
        options,
        _measure_all,
        tables=lambda record: [aligned(serving_rows(record))],
        line=lambda record: {"ratios": _medians_only(record["ratios"])},
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    flags = server_flags("serving", "lichen beside its peers", runs=3, context=2048, slots=16)
    flags.add_argument("--servers", default=",".join(peers.names()), help="which, separated by commas")
    flags.add_argument("--scenario", action="append", default=[], help="only those that begin so; may repeat")
    flags.add_argument("--quick", action="store_true", help="two scenarios, for development")
    flags.add_argument(
        "--full", action="store_true", help="every scenario in every run, an hour on two cores"
    )
    flags.add_argument("--publish", action="store_true", help="also write the table and pictures of docs/")
    flags.add_argument("--budget", type=float, default=30, help="minutes; no run begins that would pass it")
    flags.add_argument("--seed", type=int, default=1)
    options = flags.parse_args(arguments)
    try:
        options.scenarios = choose(options.scenario, quick=options.quick)
    except ValueError as error:
        flags.error(str(error))
    return options


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    servers = [peers.load(name) for name in options.servers.split(",")]
    book = PromptBook(data_folder(), seed=options.seed)
    prompts = {scenario: write_prompts(scenario, book) for scenario in options.scenarios}
    settings = Settings(
        model=model, threads=options.threads, slots=options.slots, context=options.context, port=0
    )
    record: dict[str, Any] = {
        "kind": "serving",
        "status": "ok",
        "birth": certificate(model),
        "settings": {
            name: getattr(options, name) for name in ("threads", "slots", "context", "seed", "quick")
        },
        "servers": {peer.name: _describe(peer, settings) for peer in servers},
        "scenarios": [_plain(scenario) for scenario in options.scenarios],
        "starts": [],
        "runs": [],
    }
    run_to_end(_alternate(options, servers, settings, prompts, record))
    close_certificate(record["birth"])
    _conclude(record)
    return record


def _describe(peer: Peer, settings: Settings) -> dict[str, Any]:
    return {
        "title": peer.title,
        "command": peer.shown_command(settings),
        "notes": list(peer.notes),
        **peer.identity(),
    }


def _plain(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "prompt": scenario.prompt,
        "max_tokens": scenario.max_tokens,
        "clients": scenario.clients,
        "requests": scenario.requests,
    }


async def _alternate(
    options: argparse.Namespace,
    servers: Sequence[Peer],
    settings: Settings,
    prompts: dict[Scenario, Prompts],
    record: dict[str, Any],
) -> None:
    began = time.monotonic()
    longest = 0.0
    for run in range(options.runs):
        run_began = time.monotonic()
        if run and run_began - began + longest > options.budget * 60:
            print(f"the budget of {options.budget:g} minutes ends after {run} runs", file=sys.stderr)
            break
        turn = run % len(servers)
        whole = run == 0 or options.full or bool(options.scenario)
        chosen = {scenario: texts for scenario, texts in prompts.items() if whole or not scenario.once}
        for peer in (*servers[turn:], *servers[:turn]):
            await _one_server(run, peer, settings, chosen, record)
        longest = max(longest, time.monotonic() - run_began)


async def _one_server(
    run: int, peer: Peer, settings: Settings, prompts: dict[Scenario, Prompts], record: dict[str, Any]
) -> None:
    """All scenarios on a fresh server; a failure is kept in the record, and ends only this server's turn."""
    start: dict[str, Any] = {"run": run, "server": peer.name, "status": "ok", "error": None}
    record["starts"].append(start)
    own = Settings(
        model=settings.model,
        threads=settings.threads,
        slots=settings.slots,
        context=settings.context,
        port=free_port(),
    )
    size = record["birth"]["model"]["size"]
    try:
        async with running(peer, own) as server:
            start["ready_s"] = round(server.ready_s, 3)
            await warm_up(server)
            for scenario, texts in prompts.items():
                seed = record["settings"]["seed"]
                numbers = await measure(server, scenario, texts, seed=seed, model_bytes=size)
                record["runs"].append({"run": run, "server": peer.name, "scenario": scenario.name, **numbers})
                print(_line(record["runs"][-1]), file=sys.stderr, flush=True)
    except BenchError as error:
        start.update(status="failed", error=str(error))
        print(f"run {run + 1} {peer.title}: {error}", file=sys.stderr, flush=True)


def _line(entry: dict[str, Any]) -> str:
    ttft = dig(entry, "ttft_ms", "p95")
    return (
        f"run {entry['run'] + 1} {entry['server']:<18}{entry['scenario']:<16}{entry['tokens_per_second']:8.1f} "
        f"tokens/s  TTFT p95 {ttft if ttft is not None else float('nan'):8.0f} ms  "
        f"cores: server {entry['server_cores']:.2f}, client {entry['client_cores']:.2f}, "
        f"others {entry['foreign_cores']:.2f}  {entry['status']} {'; '.join(entry['errors'][:1])}"
    )


def _conclude(record: dict[str, Any]) -> None:
    """Medians over the good runs, and ratios of the first server to each other one, paired by run."""
    good = [entry for entry in record["runs"] if entry["status"] == "ok"]
    names = list(record["servers"])
    subject, others = names[0], names[1:]
    record["summary"], record["ratios"] = {}, {}
    for scenario in (entry["name"] for entry in record["scenarios"]):
        cells = {
            name: {metric: _by_run(good, name, scenario, path) for metric, path in METRICS.items()}
            for name in names
        }
        record["summary"][scenario] = {
            name: {
                "runs": len(cell["tokens_per_second"]),
                **{metric: rounded(median(values.values()), 4) for metric, values in cell.items()},
            }
            for name, cell in cells.items()
        }
        record["ratios"][scenario] = {
            other: {
                metric: ratio
                for metric in METRICS
                if (ratio := paired_ratio(cells[subject][metric], cells[other][metric])) is not None
            }
            for other in others
        }
    entries: Iterable[dict[str, Any]] = itertools.chain(record["runs"], record["starts"])
    if any(entry["status"] != "ok" for entry in entries):
        record["status"] = "failed"


def _by_run(
    entries: Sequence[dict[str, Any]], server: str, scenario: str, path: tuple[str, ...]
) -> dict[int, float | None]:
    return {
        entry["run"]: dig(entry, *path)
        for entry in entries
        if entry["server"] == server and entry["scenario"] == scenario
    }


def _medians_only(ratios: dict[str, Any]) -> dict[str, Any]:
    return {
        scenario: {
            other: {metric: ratio["median"] for metric, ratio in metrics.items()}
            for other, metrics in per_server.items()
        }
        for scenario, per_server in ratios.items()
    }


if __name__ == "__main__":
    sys.exit(main())
