"""One device of a simulated fleet: what it runs, the update that is under way, and when it is on."""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass
from typing import Protocol

import msgspec

from bench.simulated_mirror import Costs, Mirror, Remembered
from lichen.errors import MetadataExpired
from lichen.sync.reporting.key import DeviceKey
from lichen.sync.reporting.outbox import Outbox
from lichen.sync.reporting.reporter import Reporter
from lichen.sync.rollout import Assignment, DeviceFacts, Gates, Policy, Release, decide
from lichen.sync.trust.device import FleetTarget
from lichen.sync.trust.enrolment import Enrolment
from lichen.sync.trust.member import told
from lichen.sync.updates.health import Answer, Health, Prompt, measured, verdict
from lichen.sync.updates.states import Cause, State, Update, advanced, deadline

START = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC).timestamp()
HOUR, DAY = 3600.0, 86_400.0
FLEET, NAME, SLOT = "moss", "support", "adapters/support"
POLICY = f"policies/{NAME}"
POLL_S = 6 * HOUR
TRIAL_S = 30.0
GATES = Gates(max_rollbacks=0.005, min_reports=200, soak_s=DAY)
HEALTH = Health(prompts=tuple(Prompt(text=f"Question {n}", expects=(f"{n}",)) for n in range(4)))


@dataclass(frozen=True)
class World:
    """What the devices live through. Times in seconds, shares of 1, rates in bytes a second.

    faulty: share of the devices on which version 2 fails. dark: share that goes off and never comes back.
    """

    devices: int = 10_000
    faulty: float = 0.02
    dark: float = 0.02
    online: float = 3 * DAY
    offline: float = 12 * HOUR
    bandwidth: float = 50_000.0
    power_cut: float = 0.01
    size: int = 2_000_000
    days: float = 14.0
    seed: int = 1
    waves: tuple[float, ...] = (5, 25, 100)
    gates: Gates = GATES


class Surroundings(Protocol):
    """What a device needs of its fleet."""

    world: World
    costs: Costs
    mirror: Mirror
    first: Remembered
    old: Release
    new: Release

    async def post(self, path: str, body: bytes, signature: str) -> tuple[int, bytes]:
        """See lichen.sync.reporting.reporter.Post."""
        ...

    def clock(self) -> float:
        """Seconds since 1970."""
        ...

    def later(self, at: float, device: Device, state: State | None) -> None:
        """Wake a device then."""
        ...

    def bundle(self, tags: dict[str, str]) -> Enrolment:
        """What a device was enrolled with."""
        ...


class Device:
    """One device: what it runs, the update that is under way, and when it can be reached."""

    def __init__(self, number: int, fleet: Surroundings) -> None:
        world = fleet.world
        self.number, self._fleet = number, fleet
        self.chance = random.Random(f"{world.seed} device {number}")
        self.key = DeviceKey.generate()
        self.faulty = self.chance.random() < world.faulty
        self.dark_from = (
            self.chance.uniform(0, world.days * DAY) if self.chance.random() < world.dark else None
        )
        self.tags = {"site": self.chance.choice(("oslo", "lima", "pune"))}
        self.active: str | None = fleet.old.sha256
        self.refused: frozenset[str] = frozenset()
        self.update: Update | None = None
        self.remembered = fleet.first
        self.policy: tuple[str, Policy] | None = None
        self.reporter: Reporter | None = None
        self.outbox: Outbox | None = None
        self.joined = False
        self.phase = self.chance.uniform(0, POLL_S)
        self._off = self._spells(world)

    def reachable(self, now: float) -> float:
        """When the device is on, from now on; infinity for never."""
        if self.dark_from is not None and now >= START + self.dark_from:
            return float("inf")
        for begin, end in self._off:
            if begin <= now < end:
                return end if self.dark_from is None or end < START + self.dark_from else float("inf")
        return now

    def _spells(self, world: World) -> list[tuple[float, float]]:
        spells, at = [], START - self.chance.uniform(0, world.online)
        while at < START + (world.days + 30) * DAY:
            begin = at + self.chance.expovariate(1 / world.online)
            at = begin + self.chance.expovariate(1 / world.offline)
            spells.append((begin, at))
        return spells

    async def poll(self, now: float) -> None:
        """What a device does from time to time: look, decide, go on."""
        if self.update is not None and not self.update.ended and now >= deadline(self.update):
            await self._end(now, "timed_out", "It took too long.")
        try:
            policy = self.look(now)
        except MetadataExpired:
            return
        moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
        facts = DeviceFacts(id=self.key.id, tags=self.tags, active=self.active, refused=self.refused)
        todo = decide(policy, facts, moment)
        if self.update is not None and not self.update.ended:
            if todo.release is not None and todo.release.sha256 == self.update.sha256:
                return
            await self._end(now, "superseded", todo.reason)
        if todo.release is not None:
            await self._begin(todo, now)
        elif not self.joined or self.outbox is not None:
            await self._tell(now)

    async def go_on(self, state: State, now: float) -> None:
        """A step of the update is done."""
        update = self.update
        if update is None or update.ended or update.state != state:
            return
        if now >= deadline(update):
            await self._end(now, "timed_out", "It took too long.")
        elif state == "downloading":
            self._fleet.costs.add("payload", update.size)
            for after in ("downloaded", "staged", "active"):
                await self._enter(after, now)
            self.active = update.sha256
            self._fleet.later(now + TRIAL_S, self, "active")
        elif state == "active":
            await self._judge(update, now)

    async def _judge(self, update: Update, now: float) -> None:
        """The trial; a power cut in it costs another one."""
        if self.chance.random() < self._fleet.world.power_cut:
            self._fleet.later(now + 600, self, "active")
            return
        bad = self.faulty and update.sha256 == self._fleet.new.sha256
        answers = [
            Answer(text="?" if bad else str(n), tokens=20, seconds=self.chance.uniform(0.9, 1.1))
            for n in range(len(HEALTH.prompts))
        ]
        found = measured(HEALTH, answers, None)
        why = verdict(HEALTH, found)
        self.update = msgspec.structs.replace(update, measured=found)
        if why:
            self.refused |= {update.sha256}
            await self._end(now, "unhealthy", why)
        else:
            await self._enter("confirmed", now)
            await self._tell(now)

    async def _begin(self, todo: Assignment, now: float) -> None:
        assert todo.release is not None
        target = self._target(todo.release, now)
        self.update = Update(
            id=1,
            slot=SLOT,
            target=todo.release.path,
            sha256=target.sha256,
            size=target.size,
            manifest=target.manifest,
            state="offered",
            begun=now,
            entered=now,
            before=self.active or "",
        )
        self._put()
        await self._enter("downloading", now)
        kept = todo.release == self._fleet.old  # an older version is still in the store
        seconds = 1.0 if kept else target.size / self._fleet.world.bandwidth * self.chance.uniform(0.5, 3)
        self._fleet.later(now + seconds, self, "downloading")

    async def _enter(self, state: State, now: float) -> None:
        assert self.update is not None
        self.update = advanced(self.update, state, now)
        self._put()

    async def _end(self, now: float, cause: Cause, reason: str) -> None:
        assert self.update is not None
        if self.active == self.update.sha256:
            self.active = self.update.before or None
        self.update = advanced(self.update, "rolled_back", now, cause=cause, reason=reason)
        self._put()
        await self._tell(now)

    def look(self, now: float) -> Policy:
        """The policy as it is signed now; what was asked for is counted."""
        look = self._fleet.mirror.look(self.remembered, POLICY, now)
        self.remembered = look.remembered
        assert look.target is not None
        if self.policy is None or self.policy[0] != look.target.sha256:
            self.policy = (look.target.sha256, self._fleet.mirror.policy(look.target))
        return self.policy[1]

    def _target(self, release: Release, now: float) -> FleetTarget:
        look = self._fleet.mirror.look(self.remembered, release.path, now)
        self.remembered = look.remembered
        assert look.target is not None
        assert look.target.sha256 == release.sha256
        return look.target

    def _put(self) -> None:
        assert self.update is not None
        self._open().put(told(self.update))

    def _open(self) -> Reporter:
        if self.reporter is None:
            self.outbox = Outbox(":memory:", clock=self._fleet.clock)
            bundle = self._fleet.bundle(self.tags)
            self.reporter = Reporter(self.key, self.outbox, bundle, clock=self._fleet.clock)
        return self.reporter

    async def _tell(self, now: float) -> None:
        """Send what waits; the file is closed once it is empty, as after a restart."""
        if self.reachable(now) > now:
            return
        reporter = self._open()
        await reporter.flush(self._fleet.post)
        self.joined = True
        reporter.close()
        self.reporter = self.outbox = None
