"""A fleet in virtual time: thousands of devices in one process, through the code that a device runs.

Real here: the publisher and its signatures, TUF's verification, `decide`, the states of an update and their
time-outs, the bar of the trial, signed reports with their outbox, the collector's rules and database, the gates
and the steps that they lead to. Made up: time, links, engines and disks. Bytes of a version are counted as one
download of the whole file and never hashed.

`simulated_device.py` is one device, `simulated_mirror.py` what it fetches from and what that costs.
"""

from __future__ import annotations

import datetime
import heapq
import random
from pathlib import Path

import msgspec

from bench.simulated_device import DAY, FLEET, HOUR, NAME, POLL_S, SLOT, START, Device, World
from bench.simulated_mirror import Costs, Mirror, Remembered
from lichen.errors import LichenError
from lichen.sync.collector.board import Census
from lichen.sync.collector.database import Database
from lichen.sync.collector.desk import Desk
from lichen.sync.collector.reading import step
from lichen.sync.manifest import AdapterManifest
from lichen.sync.rollout import Policy, Release, Wave
from lichen.sync.trust.enrolment import Enrolment
from lichen.sync.trust.publisher import Publisher
from lichen.sync.trust.rollouts import Rollouts
from lichen.sync.trust.signers import Signers
from lichen.sync.updates.states import State


class SimulatedFleet:
    """The world, its publisher and its devices, under `folder`."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world, self.costs, self.now = world, Costs(), START
        self.publisher = Publisher(
            folder / "fleet", Signers(folder / "keys", lambda: "correct horse"), clock=self._moment
        )
        self.root = self.publisher.init(root_keys=1, threshold=1)
        self.first = Remembered.of({"root": self.root})
        self.old, self.new = (self._publish(folder, version) for version in ("1", "2"))
        self.rollouts = Rollouts(
            self.publisher, folder / "fleet", folder / "rollouts.lock", clock=self._moment
        )
        waves = tuple(Wave(percent=percent, gates=world.gates, hold=False) for percent in world.waves)
        self.rollouts.start("adapters", NAME, "2", waves, previous="1")
        self.mirror = Mirror(folder / "fleet", self.costs)
        self.mirror.published()
        self.database = Database(":memory:", max_devices=world.devices, retention=90 * DAY)
        self.desk = Desk(self.database, fleet=FLEET, token="t" * 32, clock=self.clock, address_rate=1 << 40)
        self._queue: list[tuple[float, int, Device, State | None]] = []
        self._count = 0
        self.devices = [Device(number, self) for number in range(world.devices)]
        self.steps: list[tuple[float, str]] = []

    async def run(self) -> None:
        """Live through all days; then everybody who can be reached comes once more."""
        for each in self.devices:
            self.later(START + each.phase, each, None)
        next_step = next_renewal = START
        end = START + self.world.days * DAY
        while self._queue and self._queue[0][0] < end:
            at, _, device, state = heapq.heappop(self._queue)
            while next_step <= at:
                self.now = next_step
                if self.now >= next_renewal:
                    self.publisher.renew()
                    self.mirror.published()
                    next_renewal += 3 * DAY
                self._advance()
                next_step += HOUR
            self.now = at
            await self._one(device, state)

    async def _one(self, device: Device, state: State | None) -> None:
        on = device.reachable(self.now)
        if on > self.now:
            if on != float("inf"):
                self.later(on, device, state)
        elif state is None:
            await device.poll(self.now)
            self.later(self.now + POLL_S * device.chance.uniform(0.9, 1.1), device, None)
        else:
            await device.go_on(state, self.now)

    def later(self, at: float, device: Device, state: State | None) -> None:
        """A device wakes then: for a step of its update in `state`, or to poll."""
        self._count += 1
        heapq.heappush(self._queue, (at, self._count, device, state))

    async def post(self, path: str, body: bytes, signature: str) -> tuple[int, bytes]:
        """See lichen.sync.reporting.reporter.Post."""
        self.costs.add("reports", len(body))
        try:
            act = self.desk.join if path == "/v1/devices" else self.desk.take
            return 200, msgspec.json.encode(act(body, signature, ""))
        except LichenError as error:
            return error.status, str(error).encode()

    def clock(self) -> float:
        """Seconds since 1970."""
        return self.now

    def bundle(self, tags: dict[str, str]) -> Enrolment:
        """What a device was enrolled with."""
        return Enrolment(
            fleet=FLEET,
            root=self.root,
            mirrors=("https://m.example/",),
            tags=tags,
            collector="https://c.example/",
            token="t" * 32,
        )

    def policy(self) -> Policy:
        """The rollout as it is signed now."""
        return self.rollouts.get(NAME)

    def _advance(self) -> None:
        """The publisher's watch: one look an hour."""
        before = self.policy()
        if before.state != "running":
            return
        census = Census(slot=SLOT, at=self.now, members=(), reported=tuple(self.database.reported(SLOT)))
        after, verdict = step(self.rollouts, NAME, census, self._moment(), person=False)
        if after != before:
            self.mirror.published()
            self.steps.append((self.now, verdict.reason))

    def _publish(self, folder: Path, version: str) -> Release:
        file = folder / f"{NAME}-{version}"
        file.write_bytes(random.Random(version).randbytes(self.world.size))
        manifest = AdapterManifest(name=file.name, size=self.world.size, licence="MIT", base="b" * 64)
        target = self.publisher.publish(file, manifest)
        return Release(version=version, path=manifest.path, sha256=target.hashes["sha256"])

    def _moment(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.now, datetime.UTC)
