"""A rollout: the signed policy that says who gets which version, and what a device reads in it.

A policy is a target of the role `policies` and a small JSON document. Whoever has that role's key changes it:
opening a wave, pausing and rolling back are each one new document. `decide` is what every device does with
it; it is pure, and it has an answer for every policy, device and time. What devices report comes back to the
publisher through `gates.py`.

    running       devices of the open waves take `version`, all others have `previous`
    paused        nobody takes `version`; who has it keeps it
    stopped       the same, for good
    rolled_back   everybody goes back to `previous`

A device stands at one point of [0, 1), by a hash of its id and the rollout's salt; a wave of p per cent holds
the points below p/100. So a device's wave never changes, and a larger wave holds every smaller one. Another
salt (by default each version has its own) makes other devices the first.
"""

from __future__ import annotations

import datetime
import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from lichen.errors import FleetError, ManifestError
from lichen.sync.manifest import Name, Sha256, Words
from lichen.sync.updates.health import Health

LIMIT = 1 << 18  # bytes of a policy
SCHEMA = 1

Kind = Literal["models", "adapters", "mixtures", "checkpoints"]
RolloutState = Literal["running", "paused", "stopped", "rolled_back"]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=3.2e9)]
Time = Annotated[datetime.datetime, Meta(tz=True)]
Hardware = Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,127})?\Z")]  # "": not known
Tags = Annotated[dict[Name, Words], Meta(max_length=64)]


class Release(Struct, frozen=True, kw_only=True):
    """One version of what is rolled out. path: its target, such as "adapters/support-2"."""

    version: Name
    path: Annotated[str, Meta(max_length=160)]
    sha256: Sha256


class Gates(Struct, frozen=True, kw_only=True):
    """What a wave must show before the next one opens; None asks for nothing.

    max_errors: mean share of a device's requests that failed. max_rollbacks: share of the devices at their
    goal that refused the version. min_quality: mean of the health prompts' quality, 0 to 1. min_speed: median
    of tokens/s over the same device's tokens/s before. min_reports: devices that have to be at their goal.
    soak_s: seconds that the wave is open at least. patience_s: seconds after which a wave without
    its reports counts as failed.
    """

    max_errors: Share | None = 0.01
    max_rollbacks: Share | None = 0.005
    min_quality: Share | None = None
    min_speed: Annotated[float, Meta(ge=0, le=1000)] | None = 0.8
    min_reports: Annotated[int, Meta(ge=0, le=1 << 31)] = 1
    soak_s: Seconds = 3600.0
    patience_s: Seconds | None = None


class Wave(Struct, frozen=True, kw_only=True):
    """Who may have the version once the wave is open.

    percent: of all devices, by hash. tags: every one of them must be the device's. hardware: classes, any of
    which the device must be; empty for all. spread_s: seconds over which its devices start, by hash, so that
    they do not come all at once. hold: the next wave waits for a person even if the gates are passed.
    """

    percent: Annotated[float, Meta(gt=0, le=100)] = 100.0
    tags: Tags = {}
    hardware: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    gates: Gates = Gates()
    spread_s: Seconds = 0.0
    hold: bool = True


class Policy(Struct, frozen=True, kw_only=True):
    """A rollout as it is signed. opened: how many of the waves are open, since `opened_at` the last.

    previous: None if there is none to go back to. health: the bar of each device's trial. on_failure: what
    a wave that fails its gates leads to. reason: why it is in this state, for people.
    """

    kind: Kind
    name: Name
    version: Release
    previous: Release | None = None
    waves: Annotated[tuple[Wave, ...], Meta(min_length=1, max_length=32)]
    opened: Annotated[int, Meta(ge=0, le=32)]
    opened_at: Time
    state: RolloutState = "running"
    on_failure: Literal["stopped", "rolled_back"] = "rolled_back"
    health: Health | None = None
    salt: Annotated[str, Meta(max_length=300)] = ""
    reason: Annotated[str, Meta(max_length=400)] = ""

    def __post_init__(self) -> None:
        """ValueError becomes a ValidationError of whoever decodes."""
        if self.opened > len(self.waves):
            raise ValueError(f"{self.opened} waves are open, but there are {len(self.waves)}")
        for release in (self.version, self.previous):
            if release is not None and release.path.partition("/")[0] != self.kind:
                raise ValueError(f"the path {release.path!r} is not below {self.kind!r}")

    @property
    def path(self) -> str:
        """The policy's own target."""
        return f"policies/{self.name}"

    @property
    def complete(self) -> bool:
        """Whether all waves are open."""
        return self.opened == len(self.waves)


class DeviceFacts(Struct, frozen=True, kw_only=True):
    """What a device knows of itself. id: sha256 of its public key, in hex.

    hardware: its class, "" where none is known. active: sha256 of what it has of this rollout's name, if any.
    refused: digests that failed here, and that it therefore takes no more.
    """

    id: str
    tags: dict[str, str] = {}
    hardware: str = ""
    active: str | None = None
    refused: frozenset[str] = frozenset()


class Assignment(Struct, frozen=True, kw_only=True):
    """What a device is to do now.

    take: get `release` and switch to it. return: go back to `release`, or to nothing if that is None.
    keep: no change. wave: the first wave that holds this device, counted from 0.
    """

    action: Literal["take", "return", "keep"]
    release: Release | None = None
    wave: int | None = None
    reason: str = ""


def release_path(kind: str, name: str, version: str) -> str:
    """Where a version is published: "adapters/support-2" for version 2 of the adapter `support`."""
    return f"{kind}/{name}-{version}"


def point(policy: Policy, device_id: str, purpose: str = "wave") -> float:
    """Where a device stands in [0, 1) in this rollout. Each purpose has points of its own."""
    salt = policy.salt or f"{policy.kind}/{policy.name}/{policy.version.sha256}"
    text = "\0".join((purpose, salt, device_id)).encode("utf-8", "surrogatepass")
    return float(int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 11) / (1 << 53)


def holds(wave: Wave, at: float, tags: dict[str, str], hardware: str) -> bool:
    """Whether a wave holds a device that stands at a point."""
    return (
        at < wave.percent / 100
        and all(tags.get(name) == words for name, words in wave.tags.items())
        and (not wave.hardware or hardware in wave.hardware)
    )


def wave_of(policy: Policy, device: DeviceFacts) -> int | None:
    """The first wave that holds a device, open or not; None if no wave ever will."""
    at = point(policy, device.id)
    for number, wave in enumerate(policy.waves):
        if holds(wave, at, device.tags, device.hardware):
            return number
    return None


def decide(policy: Policy, device: DeviceFacts, now: datetime.datetime) -> Assignment:
    """What a device is to do at an aware time. Pure and total."""
    wave = wave_of(policy, device)
    new, old = policy.version, policy.previous
    if device.active == new.sha256:
        if policy.state != "rolled_back":
            return Assignment(action="keep", wave=wave, reason="it has the version")
        return Assignment(action="return", release=old, wave=wave, reason=policy.reason or "rolled back")
    reason = f"the rollout is {policy.state.replace('_', ' ')}"
    if policy.state == "running":
        if wave is None or wave >= policy.opened:
            reason = "its wave is not open"
        elif new.sha256 in device.refused:
            reason = "the version failed here"
        elif not _due(policy, wave, device, now):
            reason = "its turn in the wave has not come"
        else:
            return Assignment(action="take", release=new, wave=wave, reason=f"wave {wave + 1} is open")
    if old is not None and device.active != old.sha256 and old.sha256 not in device.refused:
        return Assignment(action="take", release=old, wave=wave, reason=reason)
    return Assignment(action="keep", wave=wave, reason=reason)


def _due(policy: Policy, wave: int, device: DeviceFacts, now: datetime.datetime) -> bool:
    """Whether a device's turn has come; a wave that was opened before the last one has no turns left."""
    spread = policy.waves[wave].spread_s
    if not spread or wave < policy.opened - 1:
        return True
    return (now - policy.opened_at).total_seconds() >= spread * point(policy, device.id, "turn")


def open_next(policy: Policy, now: datetime.datetime, reason: str = "") -> Policy:
    """Open the next wave. Raises FleetError where the state allows none."""
    _must_be(policy, "running", "advanced")
    if policy.complete:
        raise FleetError(f"All {len(policy.waves)} waves of {policy.name} are open.")
    return msgspec.structs.replace(policy, opened=policy.opened + 1, opened_at=now, reason=reason[:400])


def pause(policy: Policy, reason: str = "") -> Policy:
    """Let nobody else take the version. Raises FleetError."""
    _must_be(policy, "running", "paused")
    return msgspec.structs.replace(policy, state="paused", reason=reason[:400])


def resume(policy: Policy) -> Policy:
    """Go on after a pause; the open waves stay open. Raises FleetError."""
    _must_be(policy, "paused", "resumed")
    return msgspec.structs.replace(policy, state="running", reason="")


def stop(policy: Policy, reason: str = "") -> Policy:
    """Let nobody else take the version, for good. Raises FleetError."""
    if policy.state == "rolled_back":
        raise FleetError(f"The rollout of {policy.name} is rolled back already.")
    return msgspec.structs.replace(policy, state="stopped", reason=reason[:400])


def roll_back(policy: Policy, reason: str = "") -> Policy:
    """Send everybody back to the previous version, from any state."""
    return msgspec.structs.replace(policy, state="rolled_back", reason=reason[:400])


def _must_be(policy: Policy, state: RolloutState, verb: str) -> None:
    if policy.state != state:
        raise FleetError(
            f"The rollout of {policy.name} is {policy.state.replace('_', ' ')} and cannot be {verb}.",
            hint="'lichen fleet status' shows where it stands.",
        )


def read_policy(data: bytes) -> Policy:
    """A policy from the bytes of its target. Raises ManifestError; unknown fields are ignored."""
    if len(data) > LIMIT:
        raise ManifestError(f"The policy is larger than {LIMIT:,} bytes.")
    try:
        return msgspec.json.decode(data, type=Policy)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"The fleet's policy is malformed: {error}.") from error


def write_policy(policy: Policy) -> bytes:
    """The policy's bytes. Raises ManifestError for one that `read_policy` would refuse."""
    data = msgspec.json.encode(policy)
    read_policy(data)
    return data
