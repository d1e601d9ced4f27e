"""`python -m bench.predictions`: what plans are predicted to do beside what daemons with these plans do.

Each plan gets a daemon of its own, in an order by chance, and goes through the loads that it is meant for.
Prints errors, and for each intent and load the plan that predictions pick beside the best that was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.certificate import certificate, close_certificate, model_file
from bench.command import carry_out
from bench.flags import model_flags
from bench.foretold import error_rows, errors, pick_rows, picks, plan_of, search_seconds
from bench.measure import warm_up
from bench.peer import SHOWN_PORT, BenchError, Settings
from bench.planned import HOME, Prepared, described, plan_peer, plan_words, prepare
from bench.prompts import PromptBook, data_folder
from bench.server import MemoryWatch, ProcessorWatch, Server, free_port, run_to_end, running
from bench.table import aligned
from bench.traffic import Reckoning, Traffic, drive, reckon
from lichen.devices.cost import predict
from lichen.devices.fingerprint import thread_counts
from lichen.devices.pace import Plan

LOADS = {
    one.name: one
    for one in (
        Traffic(name="alone", users=1, requests=5),
        Traffic(name="reader", users=1, prompt="long", requests=3),
        Traffic(name="few", users=4, answer=96, requests=3),
        Traffic(name="visitors", users=4, requests=4, pause=1.0),
        Traffic(name="readers", users=4, prompt="long", requests=2, together=True),
        Traffic(name="crowd", users=16, requests=2, together=True),
    )
}
DISTURBED, AGAIN = 0.25, 3  # cores of others past which a load is measured again, and how often at most
QUICK = {"alone": 2, "few": 1}  # loads, and requests of each user
QUICK_BUDGET = 2.5  # minutes

Grid = list[tuple[Plan, tuple[str, ...]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and one JSON line, write the result. 1 when anything failed."""
    flags = model_flags("predictions", "predictions of plans beside daemons")
    flags.add_argument("--context", type=int, default=2048, help="tokens of a slot")
    flags.add_argument(
        "--layouts", default="", help="those to choose of, with commas; by default what keeps quality"
    )
    flags.add_argument("--home", type=Path, default=HOME, help="where layouts and fingerprints are kept")
    flags.add_argument("--budget", type=float, default=30, help="minutes; no daemon starts behind them")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--quick", action="store_true", help="two layouts, two loads, few requests")
    flags.add_argument("--publish", action="store_true", help="also write the table and picture of docs/")
    options = flags.parse_args(arguments)
    if options.quick:
        options.budget = min(options.budget, QUICK_BUDGET)
    return carry_out(
        "predictions",
        options,
        _measure_all,
        tables=lambda record: [aligned(error_rows(record), left=1), aligned(pick_rows(record), left=2)],
        line=_told,
    )


def _told(record: dict[str, Any]) -> dict[str, Any]:
    kept = sum(one["kept"] for one in record["picks"])
    line = {
        "pairs": len(record["runs"]),
        "errors": {
            name: {key: one[key] for key in ("median", "p90")} for name, one in record["errors"].items()
        },
        "picks_near_best": [kept, len(record["picks"])],
        "search": record["search"],
    }
    return {"status": record["status"], "ratios": line}


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    birth = certificate(model)
    given = tuple(name for name in options.layouts.split(",") if name) or (
        ("source", "f16") if options.quick else ()
    )
    prepared = prepare(model, options.home, given)
    loads = {
        name: dataclasses.replace(one, requests=QUICK[name]) if options.quick else one
        for name, one in LOADS.items()
        if not options.quick or name in QUICK
    }
    grid = [
        (plan, names)
        for plan, wanted in plan_grid(tuple(prepared.fingerprints), options.threads, options.context)
        if (names := tuple(name for name in wanted if name in loads))
        and not (options.quick and plan.threads != options.threads)
    ]
    random.Random(options.seed).shuffle(grid)
    shown = plan_peer("lichen", grid[0][0], options.home)
    record: dict[str, Any] = {
        "kind": "predictions",
        "status": "ok",
        "birth": birth,
        "settings": {name: getattr(options, name) for name in ("threads", "context", "seed", "quick")},
        "servers": {"lichen": described(shown, _settings(prepared, grid[0][0], SHOWN_PORT), options.home)},
        "loads": [dataclasses.asdict(one) for one in loads.values()],
        "kl": dict(prepared.kl),
        "fingerprints": {name: msgspec.to_builtins(one) for name, one in prepared.fingerprints.items()},
        "starts": [],
        "runs": [],
    }
    run_to_end(_all_plans(options, prepared, grid, loads, record))
    close_certificate(record["birth"])
    conclude(record, prepared.fingerprint_s)
    return record


def plan_grid(layouts: Sequence[str], threads: int, context: int) -> Grid:
    """Plans, and the loads that each is measured under."""

    def plan(layout: str, count: int, slots: int, batch: int = 256, chunk: int = 64) -> Plan:
        return Plan(layout=layout, threads=count, slots=slots, context=context, batch=batch, chunk=chunk)

    found: Grid = []
    for layout in layouts:
        for count in thread_counts(threads):
            whole = count == threads
            found.append((plan(layout, count, 1), ("alone", "reader")))
            found.append(
                (plan(layout, count, 4), ("few", "visitors", "crowd", *(("readers",) if whole else ())))
            )
            found.append((plan(layout, count, 16), ("crowd",)))
        found.append((plan(layout, threads, 4, batch=512, chunk=256), ("few", "readers")))
    return found


def _settings(prepared: Prepared, plan: Plan, port: int) -> Settings:
    return Settings(
        model=prepared.files[plan.layout],
        threads=plan.threads,
        slots=plan.slots,
        context=plan.context,
        port=port,
    )


async def _all_plans(
    options: argparse.Namespace,
    prepared: Prepared,
    grid: Grid,
    loads: dict[str, Traffic],
    record: dict[str, Any],
) -> None:
    began = time.monotonic()
    for number, (plan, names) in enumerate(grid):
        if time.monotonic() - began > 60 * options.budget:
            print(f"the budget ends before plan {number + 1} of {len(grid)}", file=sys.stderr)
            break
        start: dict[str, Any] = {"plan": plan_words(plan), "status": "ok", "error": None}
        record["starts"].append(start)
        peer = plan_peer("lichen", plan, options.home)
        book = PromptBook(data_folder(), seed=options.seed)
        started, own = time.monotonic(), []
        try:
            async with running(peer, _settings(prepared, plan, free_port())) as server:
                start["ready_s"] = round(server.ready_s, 3)
                await warm_up(server)
                async with MemoryWatch(server.process.pid) as memory:
                    for name in names:
                        own.append(await _quiet_load(server, prepared, plan, loads[name], book, options.seed))
        except BenchError as error:
            start.update(status="failed", error=str(error))
            print(f"{plan_words(plan)}: {error}", file=sys.stderr, flush=True)
        overhead = time.monotonic() - started - sum(one["seconds"] for one in own)
        for one in own:
            if one["status"] == "ok":
                one["measured"]["memory"] = memory.peak
            one["seconds"] = round(one["seconds"] + overhead / len(own), 2)
            record["runs"].append(one)
            print(_line(one), file=sys.stderr, flush=True)


async def _quiet_load(
    server: Server, prepared: Prepared, plan: Plan, traffic: Traffic, book: PromptBook, seed: int
) -> dict[str, Any]:
    """One load; again where other programs took much of the machine meanwhile."""
    for _ in range(AGAIN):
        run = await _one_load(server, prepared, plan, traffic, book, seed)
        if run["foreign_cores"] < DISTURBED:
            break
    return run


async def _one_load(
    server: Server, prepared: Prepared, plan: Plan, traffic: Traffic, book: PromptBook, seed: int
) -> dict[str, Any]:
    began = time.monotonic()
    with ProcessorWatch(server.process.pid) as processor:
        visits = await drive(server.settings.port, traffic, book, server.peer.extras, seed=seed)
    wall = time.monotonic() - began
    server.check_alive()
    found = reckon(visits)
    run: dict[str, Any] = {
        "plan": msgspec.to_builtins(plan),
        "load": traffic.name,
        "kl": prepared.kl[plan.layout],
        "status": "ok",
        "errors": [],
        "seconds": wall,
        "foreign_cores": round(processor.foreign_cores, 3),
        "client_cores": round(processor.client_cores, 3),
    }
    if found is None or found.errors:
        run.update(status="failed", errors=list(found.errors[:5]) if found else ["nothing was answered"])
        return run
    load = traffic.load(prompt=found.prompt, answer=found.answer, shared=found.shared)
    predicted = predict(
        prepared.fingerprints[plan.layout], plan, load, memory=lambda _, held: prepared.memory(held)
    )
    run["predicted"] = {
        key: getattr(predicted, key) for key in ("ttft", "ttft_p95", "itl", "rate", "memory", "work")
    }
    run["measured"] = measured(found, processor.server_cores * wall)
    run["lengths"] = {key: getattr(found, key) for key in ("prompt", "answer", "shared", "requests")}
    return run


def measured(found: Reckoning, core_seconds: float) -> dict[str, float]:
    """What a prediction predicts; memory comes when the daemon has ended. core_seconds: of the daemon."""
    return {
        "ttft": round(found.ttft, 5),
        "ttft_p95": round(found.ttft_p95, 5),
        "itl": round(found.itl, 6),
        "rate": round(found.rate, 3),
        "work": round(core_seconds / max(1, found.tokens), 6),
    }


def conclude(record: dict[str, Any], fingerprint_s: float) -> None:
    """Errors, picks, and the seconds of both ways to a plan."""
    runs = record["runs"]
    record["errors"] = errors(runs)
    record["picks"] = picks(runs, [one["name"] for one in record["loads"]])
    record["search"] = search_seconds(runs, fingerprint_s)
    if any(one["status"] != "ok" for one in (*runs, *record["starts"])):
        record["status"] = "failed"


def _line(run: dict[str, Any]) -> str:
    words = f"{plan_words(plan_of(run)):<34}{run['load']:<10}"
    if run["status"] != "ok":
        return f"{words} {run['status']}: {run['errors'][0]}"
    told = (
        f"{name} {run['predicted'][name] * unit:7.1f}/{run['measured'][name] * unit:7.1f}"
        for name, unit in (("ttft", 1e3), ("itl", 1e3), ("rate", 1.0), ("memory", 1e-6))
    )
    return f"{words} {'  '.join(told)}  others {run['foreign_cores']:.2f} cores, {run['seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
