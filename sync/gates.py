"""Gates: what devices report of a version decides whether its rollout goes on.

`advance` is pure: a policy, the newest outcome of each device and a time in, a verdict out. It never signs
anything; whoever has the key does (`lichen fleet rollout --advance`, or `lichen fleet watch` as a service).

A device counts once, whatever it claims: shares are means of shares, and speed is a median, so that a few
devices that lie or err move a verdict by no more than their number.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from statistics import fmean, median
from typing import Annotated, Literal

from msgspec import Meta, Struct

from lichen.sync.manifest import Sha256
from lichen.sync.rollout import (
    DeviceFacts,
    Gates,
    Hardware,
    Policy,
    Share,
    Tags,
    open_next,
    roll_back,
    stop,
    wave_of,
)
from lichen.sync.updates.states import Cause, State

BLAMED: frozenset[Cause] = frozenset(
    {"timed_out", "refused", "unhealthy"}
)  # causes that speak of the version


class Outcome(Struct, frozen=True, kw_only=True):
    """Where one device stands with one version (`sha256`).

    cause: why it was rolled back; one that was cancelled or overtaken by another says nothing of the version.
    errors: share of requests that failed since it is active. quality: of its health prompts, 0 to 1.
    speed: tokens/s over tokens/s before. None where it has not measured.
    """

    device: Sha256
    sha256: Sha256
    state: State
    cause: Cause = ""
    tags: Tags = {}
    hardware: Hardware = ""
    errors: Share | None = None
    quality: Share | None = None
    speed: Annotated[float, Meta(ge=0, le=1e6)] | None = None

    @property
    def failed(self) -> bool:
        """Whether the device gave the version up because of what it is."""
        return self.state == "rolled_back" and self.cause in BLAMED

    @property
    def settled(self) -> bool:
        """Whether the device has come to an opinion of the version."""
        return self.state == "confirmed" or self.failed


class Tally(Struct, frozen=True, kw_only=True):
    """Outcomes of the open waves in numbers. reports: devices at their goal, well or badly."""

    reports: int = 0
    rollbacks: int = 0
    errors: float | None = None
    quality: float | None = None
    speed: float | None = None


class Verdict(Struct, frozen=True, kw_only=True):
    """What to do next. waits_for_person: the gates are passed, and the wave says that somebody must look."""

    action: Literal["open", "wait", "stop", "done"]
    reason: str
    tally: Tally
    waits_for_person: bool = False


def tally(policy: Policy, outcomes: Iterable[Outcome]) -> Tally:
    """Count the devices of the open waves that report on this version."""
    settled = [each for each in outcomes if each.settled and _counts(policy, each)]
    errors = [each.errors for each in settled if each.errors is not None]
    quality = [each.quality for each in settled if each.quality is not None]
    speed = [each.speed for each in settled if each.speed is not None]
    return Tally(
        reports=len(settled),
        rollbacks=sum(each.failed for each in settled),
        errors=fmean(errors) if errors else None,
        quality=fmean(quality) if quality else None,
        speed=median(speed) if speed else None,
    )


def _counts(policy: Policy, outcome: Outcome) -> bool:
    if outcome.sha256 != policy.version.sha256:
        return False
    facts = DeviceFacts(id=outcome.device, tags=outcome.tags, hardware=outcome.hardware)
    wave = wave_of(policy, facts)
    return wave is not None and wave < policy.opened


def advance(policy: Policy, outcomes: Iterable[Outcome], now: datetime.datetime) -> Verdict:
    """Judge the wave that was opened last. outcomes: the newest of each device. Pure and total.

    A gate that is missed stops the rollout as soon as enough devices are at their goal, without waiting for
    the soak; a gate whose number nobody reports counts as not passed yet.
    """
    counted = tally(policy, outcomes)

    def verdict(action: Literal["open", "wait", "stop", "done"], reason: str) -> Verdict:
        return Verdict(action=action, reason=reason, tally=counted)

    if policy.state != "running":
        return verdict("wait", f"The rollout is {policy.state.replace('_', ' ')}.")
    if policy.opened == 0:
        return verdict("open", "No wave is open yet.")
    wave, number = policy.waves[policy.opened - 1], policy.opened
    gates, age = wave.gates, (now - policy.opened_at).total_seconds()
    if counted.reports < gates.min_reports:
        if gates.patience_s is not None and age > gates.patience_s:
            return verdict("stop", f"Wave {number} has {_of(counted, gates)} after {gates.patience_s:g} s.")
        return verdict("wait", f"Wave {number} has {_of(counted, gates)}.")
    missed, unknown = _missed(gates, counted), _unknown(gates, counted)
    if missed:
        return verdict("stop", f"Wave {number} misses its gates: {'; '.join(missed)}.")
    if age < gates.soak_s:
        return verdict("wait", f"Wave {number} is fine so far and soaks for {gates.soak_s - age:.0f} s more.")
    if unknown:
        return verdict("wait", f"Nobody in wave {number} has reported {' and '.join(unknown)}.")
    if policy.complete:
        return verdict("done", f"All {len(policy.waves)} waves have passed.")
    reason = f"Wave {number} has passed with {_of(counted, gates)}."
    return Verdict(action="open", reason=reason, tally=counted, waits_for_person=wave.hold)


def applied(policy: Policy, verdict: Verdict, now: datetime.datetime) -> Policy:
    """The policy after a verdict; the same object where nothing changes. Raises FleetError."""
    if verdict.action == "open":
        return open_next(policy, now, verdict.reason)
    if verdict.action == "stop":
        return (stop if policy.on_failure == "stopped" else roll_back)(policy, verdict.reason)
    return policy


def detectable(reports: int, confidence: float = 0.95) -> float:
    """The smallest share of failing devices that `reports` devices show at least once with this confidence.

    1 - (1 - confidence)^(1/n): "the rule of three" in its exact form.
    """
    return 1.0 if reports < 1 else 1 - (1 - confidence) ** (1 / reports)


def _missed(gates: Gates, counted: Tally) -> list[str]:
    """Each gate that is not held, in words."""
    missed = []
    if gates.max_rollbacks is not None and counted.rollbacks > gates.max_rollbacks * counted.reports:
        missed.append(
            f"{counted.rollbacks} of {counted.reports} devices rolled back, {gates.max_rollbacks:.2%} may"
        )
    if gates.max_errors is not None and counted.errors is not None and counted.errors > gates.max_errors:
        missed.append(f"{counted.errors:.2%} of requests failed, {gates.max_errors:.2%} may")
    if gates.min_quality is not None and counted.quality is not None and counted.quality < gates.min_quality:
        missed.append(f"quality is {counted.quality:.3f}, at least {gates.min_quality:.3f} must be")
    if gates.min_speed is not None and counted.speed is not None and counted.speed < gates.min_speed:
        missed.append(f"tokens/s are {counted.speed:.2f} of before, at least {gates.min_speed:.2f} must be")
    return missed


def _unknown(gates: Gates, counted: Tally) -> list[str]:
    """What must be known and is not. Errors and speed may be unknown: a device may be idle or new."""
    return ["quality"] if gates.min_quality is not None and counted.quality is None else []


def _of(counted: Tally, gates: Gates) -> str:
    return f"{counted.reports} of {gates.min_reports} reports"
