"""`python -m bench.fleet`: what a rollout costs its publisher as the fleet grows, and whether a bad one is stopped.

Fleets of `bench/simulated_fleet.py` live two weeks in virtual time: one in which version 2 is good, and one in which
it fails on a share of the devices. Costs are what mirrors and the collector had to answer: requests and bytes of
bodies, without headers. The bytes of the version itself stand apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.certificate import machine_certificate, save
from bench.simulated_device import DAY, NAME, START, World
from bench.simulated_fleet import SimulatedFleet
from bench.table import Rows, aligned, number
from lichen.errors import LichenError
from lichen.sync.rollout import DeviceFacts, Gates, Policy, pause, wave_of
from lichen.sync.updates.states import LAST

SIZES = (100, 1_000, 10_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print the tables and one JSON line, write the result."""
    flags = argparse.ArgumentParser(prog="python -m bench.fleet", description="costs of a rollout")
    flags.add_argument("--devices", type=int, nargs="+", default=list(SIZES), help="sizes of the fleets")
    flags.add_argument("--faulty", type=float, default=0.02, help="share of devices that version 2 fails on")
    options = flags.parse_args(arguments)
    try:
        record: dict[str, Any] = {"kind": "fleet", "status": "ok", "birth": machine_certificate()}
        record["costs"] = [_good(count) for count in options.devices]
        record["stopped"] = _bad(max(options.devices), options.faulty)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(rows(record), left=1))
    print(json.dumps({"bench": "fleet", "result": path.name, "stopped": record["stopped"]}))
    return 0


def rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each size of fleet."""
    table: Rows = [
        [
            "devices", "requests", "per device and day", "metadata and policies MB", "kB per device and day",
            "versions MB", "reports", "reports MB", "one pause, kB per device", "seconds to simulate",
        ]
    ]  # fmt: skip
    for each in record["costs"]:
        device_days = each["devices"] * each["days"]
        table.append(
            [
                f"{each['devices']:,}",
                f"{each['requests']:,}",
                number(each["requests"] / device_days, 1),
                number(each["metadata_bytes"] / 1e6, 1),
                number(each["metadata_bytes"] / device_days / 1e3, 1),
                number(each["payload_bytes"] / 1e6, 0),
                f"{each['reports']:,}",
                number(each["report_bytes"] / 1e6, 1),
                number(each["pause_bytes"] / 1e3, 1),
                number(each["seconds"], 0),
            ]
        )
    return table


def _good(devices: int) -> dict[str, Any]:
    """A rollout that goes through all waves. The first one must be able to show something in 100 devices."""
    gates = Gates(max_rollbacks=0.005, min_reports=max(1, devices // 100), soak_s=DAY)
    world = World(devices=devices, faulty=0, gates=gates)
    life = _lived(world)
    fleet, costs = life.fleet, life.fleet.costs
    answered = ("metadata", "missing", "policies")
    return {
        "devices": devices,
        "days": world.days,
        "seconds": life.seconds,
        "complete": life.policy.complete,
        "updated": sum(each.active == fleet.new.sha256 for each in fleet.devices),
        "requests": sum(costs.requests[what] for what in (*answered, "payload")),
        "metadata_bytes": sum(costs.bytes[what] for what in answered),
        "payload_bytes": costs.bytes["payload"],
        "reports": costs.requests["reports"],
        "report_bytes": costs.bytes["reports"],
        "pause_bytes": life.pause_bytes,
        "steps": fleet.steps,
    }


def _bad(devices: int, faulty: float) -> dict[str, Any]:
    """A version that fails on a share of the devices: what it reached, and what became of every device."""
    world = World(devices=devices, faulty=faulty)
    life = _lived(world)
    fleet, policy = life.fleet, life.policy
    first = sum(wave_of(policy, DeviceFacts(id=each.key.id)) == 0 for each in fleet.devices)
    updates = [each.update for each in fleet.devices if each.update is not None]
    return {
        "devices": devices,
        "faulty": faulty,
        "seconds": life.seconds,
        "state": policy.state,
        "reason": policy.reason,
        "waves_open": policy.opened,
        "first_wave": first,
        "reached": len(updates),
        "hours": round((fleet.steps[-1][0] - START) / 3600, 1) if fleet.steps else None,
        "on_the_old_version": sum(each.active == fleet.old.sha256 for each in fleet.devices),
        "in_a_last_state": sum(each.state in LAST for each in updates),
        "off_for_good": sum(each.dark_from is not None for each in fleet.devices),
    }


@dataclass(frozen=True)
class Life:
    """A fleet after its days, and what its publisher had signed last."""

    fleet: SimulatedFleet
    policy: Policy
    seconds: float
    pause_bytes: int


def _lived(world: World) -> Life:
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fleet = SimulatedFleet(Path(folder), world)
        asyncio.run(fleet.run())
        seconds = round(time.perf_counter() - begun, 1)
        return Life(fleet, fleet.policy(), seconds, _paused(fleet))


def _paused(fleet: SimulatedFleet) -> int:
    """Bytes that one device fetches to learn of a pause, after it was up to date."""
    if fleet.policy().state != "running":
        return 0
    device = next(each for each in fleet.devices if each.dark_from is None)
    device.look(fleet.now)
    before = fleet.costs.total()
    fleet.rollouts.change(NAME, lambda policy: pause(policy, "a test"))
    fleet.mirror.published()
    device.look(fleet.now)
    return fleet.costs.total() - before


if __name__ == "__main__":
    sys.exit(main())
