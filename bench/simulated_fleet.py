"""A fleet in virtual time: thousands of devices in one process, through the code that a device runs.

Real here: the publisher and its signatures, TUF's verification, `decide`, the states of an update and their
time-outs, the bar of the trial, signed reports with their outbox, the collector's rules and database, the gates
and the steps that they lead to. Made up: time, links, engines and disks. Bytes of a version are counted as one
download of the whole file and never hashed.

Verification is a pure function of what a device remembers, what the mirror serves and the time, so it is carried out
once for each distinct triple (time by six hours) and its requests are counted for every device.
"""

from __future__ import annotations

import datetime
import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lichen.errors import LichenError, MetadataExpired
from lichen.sync.collector.board import Census
from lichen.sync.collector.database import Database
from lichen.sync.collector.desk import Desk
from lichen.sync.collector.reading import step
from lichen.sync.manifest import AdapterManifest
from lichen.sync.reporting.key import DeviceKey
from lichen.sync.reporting.outbox import Outbox
from lichen.sync.reporting.reporter import Reporter
from lichen.sync.rollout import Assignment, DeviceFacts, Gates, Policy, Release, Wave, decide, read_policy
from lichen.sync.trust.device import FleetTarget, bind
from lichen.sync.trust.enrolment import Enrolment
from lichen.sync.trust.member import told
from lichen.sync.trust.publisher import Publisher
from lichen.sync.trust.rollouts import Rollouts
from lichen.sync.trust.signers import Signers
from lichen.sync.trust.verification import Found, Verification, Walk
from lichen.sync.updates.health import Answer, Health, Prompt, measured, verdict
from lichen.sync.updates.states import Cause, State, Update, advanced, deadline

START = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC).timestamp()
HOUR, DAY = 3600.0, 86_400.0
FLEET, NAME, SLOT = "moss", "support", "adapters/support"
POLICY = f"policies/{NAME}"
POLL_S = 6 * HOUR
TRIAL_S = 30.0
RUNNING = "0.1.0"
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


@dataclass
class Costs:
    """What the publisher and the collector had to answer. Bytes of bodies; payload: of versions alone."""

    requests: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, size: int) -> None:
        """Count one answer."""
        self.requests[what] += 1
        self.bytes[what] += size

    def total(self) -> int:
        """Bytes of everything."""
        return self.bytes.total()


@dataclass(frozen=True)
class Remembered:
    """Metadata that a device trusts, by role, and a digest of all of it."""

    roles: Mapping[str, bytes]
    digest: str

    @classmethod
    def of(cls, roles: Mapping[str, bytes]) -> Remembered:
        """With its digest."""
        parts = [role.encode() + hashlib.sha256(data).digest() for role, data in sorted(roles.items())]
        return cls(roles, hashlib.sha256(b"".join(parts)).hexdigest())


@dataclass(frozen=True)
class Look:
    """What one walk over the mirror gave: what is trusted now, the target, and what was asked for.

    asked: names and bytes; a file that is not there, as the next root mostly is, has no name.
    """

    remembered: Remembered
    target: FleetTarget | None
    asked: tuple[tuple[str, int], ...]


class Mirror:
    """The publisher's folder as devices see it, verified once for each distinct look."""

    def __init__(self, folder: Path, costs: Costs) -> None:
        self._folder, self._costs = folder, costs
        self._files: dict[str, bytes | None] = {}
        self._looks: dict[tuple[str, str, str, int], Look | LichenError] = {}
        self._now = ""

    def published(self) -> None:
        """The publisher has changed something."""
        self._files.clear()
        self._now = hashlib.sha256((self._folder / "metadata" / "timestamp.json").read_bytes()).hexdigest()

    def look(self, remembered: Remembered, path: str, now: float) -> Look:
        """Refresh, then find a target. Raises what verification raises."""
        key = (remembered.digest, self._now, path, int(now // (6 * HOUR)))
        if key not in self._looks:
            try:
                self._looks[key] = self._verify(remembered, path, now)
            except LichenError as error:
                self._looks[key] = error
        found = self._looks[key]
        if isinstance(found, LichenError):
            self._costs.add("metadata", 0)
            raise found
        for name, size in found.asked:
            self._costs.add("metadata" if name else "missing", size)
        return found

    def policy(self, target: FleetTarget) -> Policy:
        """The bytes of a policy, which the device did not have yet."""
        data = (self._folder / "targets" / target.file_name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == target.sha256
        self._costs.add("policies", len(data))
        return read_policy(data)

    def _verify(self, remembered: Remembered, path: str, now: float) -> Look:
        asked: list[tuple[str, int]] = []
        moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
        verification = Verification(remembered.roles, moment)
        self._follow(verification.refresh(), asked)
        found: list[Found | None] = []
        self._follow(_into(found, verification.find(path)), asked)
        target = None if found[0] is None else bind(found[0], running=RUNNING)
        return Look(Remembered.of(verification.remembered), target, tuple(asked))

    def _follow(self, walk: Walk[None], asked: list[tuple[str, int]]) -> None:
        data: bytes | None = None
        wanted = next(walk, None)
        while wanted is not None:
            data = self._read(wanted.name)
            asked.append((wanted.name if data is not None else "", len(data or b"")))
            try:
                wanted = walk.send(data)
            except StopIteration:
                return

    def _read(self, name: str) -> bytes | None:
        if name not in self._files:
            path = self._folder / "metadata" / name
            self._files[name] = path.read_bytes() if path.is_file() else None
        return self._files[name]


class Device:
    """One device: what it runs, the update that is under way, and when it can be reached."""

    def __init__(self, number: int, fleet: SimulatedFleet) -> None:
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


def _into(found: list[Found | None], walk: Walk[Found | None]) -> Walk[None]:
    """A walk that puts its result into a list."""
    found.append((yield from walk))
