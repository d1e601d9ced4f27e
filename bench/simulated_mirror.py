"""The publisher's mirror in a simulated fleet: what devices ask for is verified once and counted for each.

Verification is a pure function of what a device remembers, what the mirror serves and the time, so it is carried out
once for each distinct triple (time by six hours); its requests are counted for every device.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lichen.errors import LichenError
from lichen.sync.rollout import Policy, read_policy
from lichen.sync.trust.device import FleetTarget, bind
from lichen.sync.trust.verification import Found, Verification, Walk

RUNNING = "0.1.0"
SPAN_S = 6 * 3600.0  # within which the clock changes nothing


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
        key = (remembered.digest, self._now, path, int(now // SPAN_S))
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


def _into(found: list[Found | None], walk: Walk[Found | None]) -> Walk[None]:
    """A walk that puts its result into a list."""
    found.append((yield from walk))
