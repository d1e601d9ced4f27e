"""Who gets which version: properties of `decide`, and documents that are no policy."""

from __future__ import annotations

import datetime
import json
import random
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.errors import FleetError, ManifestError
from lichen.sync.rollout import (
    LIMIT,
    DeviceFacts,
    Policy,
    RolloutState,
    Wave,
    decide,
    open_next,
    pause,
    point,
    read_policy,
    resume,
    roll_back,
    stop,
    wave_of,
    write_policy,
)
from tests.sync.rollouts import NEW, NOW, OLD, device_id, facts, policies, policy, times

replace = msgspec.structs.replace


@given(policies(), facts, times)
def test_there_is_always_an_answer_and_it_makes_sense(
    rollout: Policy, device: DeviceFacts, now: datetime.datetime
) -> None:
    """Total: any policy, device and time. The two versions are all that is ever offered."""
    got = decide(rollout, device, now)
    assert got == decide(rollout, device, now)
    assert got.release in (None, rollout.version, rollout.previous)
    assert got.release is None or got.release.sha256 != device.active, "no work without a change"
    if got.action == "take":
        assert got.release is not None
        assert got.release.sha256 not in device.refused
    if got.action == "return":
        assert (rollout.state, device.active) == ("rolled_back", rollout.version.sha256)


@given(policies(), facts, st.lists(times, max_size=3), st.integers(0, 4))
def test_the_wave_of_a_device_is_stable(
    rollout: Policy, device: DeviceFacts, moments: list[datetime.datetime], opened: int
) -> None:
    """Neither time, nor state, nor the number of open waves, nor what it runs changes it."""
    wave = wave_of(rollout, device)
    later = replace(rollout, opened=min(opened, len(rollout.waves)), state="paused")
    assert wave_of(later, replace(device, active="3" * 64)) == wave
    assert {decide(later, device, now).wave for now in moments} <= {wave}


@given(st.floats(0, 100, exclude_min=True), st.floats(0, 100, exclude_min=True), st.integers())
def test_a_larger_percentage_holds_every_device_of_a_smaller_one(one: float, two: float, number: int) -> None:
    small, large = (policy(percent) for percent in sorted((one, two)))
    device = DeviceFacts(id=device_id(number))
    assert wave_of(small, device) is None or wave_of(large, device) is not None


@given(policies(), facts, times)
def test_opening_a_wave_takes_the_version_from_nobody(
    rollout: Policy, device: DeviceFacts, now: datetime.datetime
) -> None:
    running = replace(rollout, state="running")
    if running.complete:
        return
    before, after = decide(running, device, now), decide(open_next(running, now), device, now)
    if before.release == NEW:
        assert after.release == NEW
    if device.active == NEW.sha256:
        assert (before.action, after.action) == ("keep", "keep")


@pytest.mark.parametrize("percent", [0.5, 1, 10, 50, 99])
def test_a_percentage_is_about_that_share_of_random_devices(percent: float) -> None:
    """Within five standard deviations of a binomial; at another salt other devices are chosen."""
    chance, count, share = random.Random(1), 40_000, percent / 100
    ids = [chance.randbytes(32).hex() for _ in range(count)]
    first, second = policy(percent), policy(percent, salt="another")
    inside = {each for each in ids if wave_of(first, DeviceFacts(id=each)) == 0}
    assert abs(len(inside) - count * share) < 5 * (count * share * (1 - share)) ** 0.5
    both = sum(wave_of(second, DeviceFacts(id=each)) == 0 for each in inside)
    expected = len(inside) * share
    assert abs(both - expected) < 5 * max(1.0, expected * (1 - share)) ** 0.5


@given(policies(), facts, times, st.sampled_from(["paused", "stopped", "rolled_back"]))
def test_nothing_new_is_offered_unless_it_runs(
    rollout: Policy, device: DeviceFacts, now: datetime.datetime, state: RolloutState
) -> None:
    assert decide(replace(rollout, state=state), device, now).release != NEW


@given(policies(), facts, times)
def test_rolled_back_returns_every_device_to_the_previous_version(
    rollout: Policy, device: DeviceFacts, now: datetime.datetime
) -> None:
    """Except where that one failed too: the device then keeps what it has, unless it is the bad one."""
    got = decide(roll_back(rollout), device, now)
    if rollout.previous is None:
        assert got.action == ("return" if device.active == NEW.sha256 else "keep")
    elif device.active == NEW.sha256:
        assert (got.action, got.release) == ("return", OLD)
    elif device.active == OLD.sha256 or OLD.sha256 in device.refused:
        assert got.action == "keep"
    else:
        assert (got.action, got.release) == ("take", OLD)


def test_who_is_in_no_open_wave_has_the_previous_version() -> None:
    """A new device, and one that was away for three versions."""
    rollout = policy(1, opened=0)
    for active in (None, "3" * 64):
        got = decide(rollout, DeviceFacts(id=device_id(1), active=active), NOW)
        assert (got.action, got.release) == ("take", OLD)
    assert decide(policy(100, previous=None, opened=0), DeviceFacts(id="x"), NOW).action == "keep"


def test_tags_and_hardware_choose() -> None:
    ring = Wave(tags={"ring": "canary"})
    large = Wave(percent=50, hardware=("large", "huge"))
    rollout = policy(waves=(ring, large, Wave()))
    assert wave_of(rollout, DeviceFacts(id="x", tags={"ring": "canary", "site": "oslo"})) == 0
    assert wave_of(rollout, DeviceFacts(id="x", tags={"ring": "late"})) == 2
    inside = {wave_of(rollout, DeviceFacts(id=device_id(n), hardware="large")) for n in range(50)}
    assert inside == {1, 2}
    assert {wave_of(rollout, DeviceFacts(id=device_id(n), hardware="small")) for n in range(50)} == {2}


def test_the_devices_of_a_wave_come_one_after_the_other() -> None:
    """Half of them after half of the time, all of them at its end; older waves do not wait again."""
    rollout = policy(waves=(Wave(spread_s=3600), Wave()))
    devices = [DeviceFacts(id=device_id(number), active=OLD.sha256) for number in range(1000)]

    def started(at: Policy, seconds: float) -> int:
        now = NOW + datetime.timedelta(seconds=seconds)
        return sum(decide(at, each, now).action == "take" for each in devices)

    assert started(rollout, -1) == 0
    assert 420 < started(rollout, 1800) < 580
    assert started(rollout, 3600) == 1000
    assert started(open_next(rollout, NOW), 0) == 1000


def test_a_version_that_failed_is_not_taken_again() -> None:
    device = DeviceFacts(id="x", active=OLD.sha256, refused=frozenset({NEW.sha256}))
    assert decide(policy(100), device, NOW).reason == "the version failed here"


def test_what_follows_on_what() -> None:
    rollout = policy()
    paused = pause(rollout, "lunch")
    assert (paused.state, paused.reason, resume(paused).state) == ("paused", "lunch", "running")
    assert resume(paused).opened == 1
    with pytest.raises(FleetError, match="is running and cannot be resumed"):
        resume(rollout)
    for bad in (paused, stop(rollout), roll_back(rollout)):
        with pytest.raises(FleetError, match="cannot be advanced"):
            open_next(bad, NOW)
    with pytest.raises(FleetError, match="cannot be resumed"):
        resume(stop(paused))
    with pytest.raises(FleetError, match="rolled back already"):
        stop(roll_back(rollout))
    with pytest.raises(FleetError, match="All 1 waves"):
        open_next(policy(5), NOW)
    assert len(roll_back(rollout, "x" * 1000).reason) == 400


@given(policies())
def test_a_policy_goes_there_and_back(rollout: Policy) -> None:
    assert read_policy(write_policy(rollout)) == rollout
    with_news = json.loads(write_policy(rollout)) | {"of the future": [1]}
    assert read_policy(json.dumps(with_news).encode()) == rollout


@dataclass
class Lie:
    """A field and a value that must not be believed."""

    field: str
    value: Any


@pytest.mark.parametrize(
    "lie",
    [
        Lie("state", "hanging"),
        Lie("kind", "policies"),
        Lie("name", "../x"),
        Lie("opened", 4),
        Lie("opened", -1),
        Lie("opened", 1.5),
        Lie("waves", []),
        Lie("waves", [{}] * 33),
        Lie("waves", [{"percent": 0}]),
        Lie("waves", [{"percent": 101}]),
        Lie("waves", [{"gates": {"max_errors": 2}}]),
        Lie("waves", [{"gates": {"soak_s": -1}}]),
        Lie("opened_at", "2026-11-24T12:00:00"),
        Lie("opened_at", "soon"),
        Lie("version", {"version": "2", "path": "adapters/x", "sha256": "2" * 63}),
        Lie("version", {"version": "2", "path": "models/x", "sha256": "2" * 64}),
        Lie("previous", {"version": "1", "path": "../x", "sha256": "1" * 64}),
        Lie("salt", "x" * 301),
        Lie("on_failure", "shrug"),
    ],
    ids=str,
)
def test_a_lie_is_no_policy(lie: Lie) -> None:
    document = json.loads(write_policy(policy())) | {lie.field: lie.value}
    with pytest.raises(ManifestError, match="malformed"):
        read_policy(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 200_000, b"null", b"{}", b" " * (LIMIT + 1)])
def test_bytes_that_are_no_policy(data: bytes) -> None:
    with pytest.raises(ManifestError, match="policy is"):
        read_policy(data)


def test_points_fill_the_unit_interval() -> None:
    points = [point(policy(), device_id(number)) for number in range(2000)]
    assert 0 <= min(points) < 0.01
    assert 0.99 < max(points) < 1
