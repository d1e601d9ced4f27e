"""What became of rollouts, counted: the table of `lichen fleet status`, the collector's JSON and its page.

Pure: devices, their outcomes and the policies in, numbers out. A collector knows what devices say; which
waves there are stands in the signed policies.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence

from msgspec import Struct

from lichen.sync.collector.database import Member, Reported
from lichen.sync.gates import Verdict, advance
from lichen.sync.rollout import DeviceFacts, Policy, wave_of

SILENT = 7 * 86_400.0  # seconds without a word after which a device is counted as silent


class Census(Struct, frozen=True, kw_only=True):
    """All that is known of one slot. at: seconds since 1970."""

    slot: str
    at: float
    members: tuple[Member, ...]
    reported: tuple[Reported, ...]


class WaveRow(Struct, frozen=True, kw_only=True):
    """One wave. devices: known ones in it and in no wave before. states: of the new version, by state."""

    number: int
    percent: float
    condition: str
    open: bool
    devices: int
    states: dict[str, int]


class FailureRow(Struct, frozen=True, kw_only=True):
    """Devices that a version failed on, for one reason."""

    target: str
    cause: str
    code: str
    devices: int


class Board(Struct, frozen=True, kw_only=True):
    """One slot. versions: devices by the target that they run. verdict: None without a policy."""

    slot: str
    devices: int
    silent: int
    versions: dict[str, int]
    waves: tuple[WaveRow, ...]
    failures: tuple[FailureRow, ...]
    state: str = ""
    target: str = ""
    reason: str = ""
    quality: float | None = None
    verdict: Verdict | None = None


def board(census: Census, policy: Policy | None) -> Board:
    """Count a slot. policy: its rollout, where there is one."""
    members = {each.id: each for each in census.members if each.membership == "member"}
    running = _running(census.reported)
    verdict = None
    if policy is not None:
        now = datetime.datetime.fromtimestamp(census.at, datetime.UTC)
        verdict = advance(policy, census.reported, now)
    failed = Counter((each.target, each.cause, each.code) for each in census.reported if each.failed)
    return Board(
        slot=census.slot,
        devices=len(members),
        silent=sum(census.at - each.seen > SILENT for each in members.values()),
        versions=dict(sorted(Counter(running.values()).items())),
        waves=() if policy is None else _waves(policy, list(members.values()), census.reported),
        failures=tuple(
            FailureRow(target=target, cause=cause, code=code, devices=devices)
            for (target, cause, code), devices in failed.most_common(20)
        ),
        state="" if policy is None else policy.state,
        target="" if policy is None else policy.version.path,
        reason="" if policy is None else policy.reason,
        quality=None if verdict is None else verdict.tally.quality,
        verdict=verdict,
    )


def condition(policy: Policy, number: int) -> str:
    """Whom a wave holds, in words, such as "10%, site=oslo, large"."""
    wave = policy.waves[number]
    tags = [f"{name}={words}" for name, words in sorted(wave.tags.items())]
    return ", ".join([f"{wave.percent:g}%", *tags, *([" or ".join(wave.hardware)] if wave.hardware else [])])


def _running(reported: Sequence[Reported]) -> dict[str, str]:
    """The target that each device runs: the last one that it confirmed."""
    last: dict[str, Reported] = {}
    for each in reported:
        known = last.get(each.device)
        if each.state == "confirmed" and (known is None or each.sequence > known.sequence):
            last[each.device] = each
    return {device: each.target for device, each in last.items()}


def _waves(policy: Policy, members: Sequence[Member], reported: Sequence[Reported]) -> tuple[WaveRow, ...]:
    states = {each.device: each.state for each in reported if each.sha256 == policy.version.sha256}
    counted: list[Counter[str]] = [Counter() for _ in policy.waves]
    for each in members:
        wave = wave_of(policy, DeviceFacts(id=each.id, tags=each.tags, hardware=each.hardware))
        if wave is not None:
            counted[wave][states.get(each.id, "")] += 1
    return tuple(
        WaveRow(
            number=number + 1,
            percent=wave.percent,
            condition=condition(policy, number),
            open=number < policy.opened,
            devices=counted[number].total(),
            states={state: count for state, count in sorted(counted[number].items()) if state},
        )
        for number, wave in enumerate(policy.waves)
    )
