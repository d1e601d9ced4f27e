"""When a rollout goes on, waits and stops."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given

from lichen.sync.gates import Outcome, advance, applied, detectable, tally
from lichen.sync.rollout import Gates, Policy, Wave, pause, stop
from tests.sync.rollouts import NOW, OLD, outcome, outcomes, policies, policy, times

LATER = NOW + datetime.timedelta(hours=2)


def of(good: int, bad: int = 0, **fields: Any) -> list[Outcome]:
    return [outcome(n, **fields) for n in range(good)] + [
        outcome(good + n, state="rolled_back", cause="unhealthy") for n in range(bad)
    ]


def gated(**gates: Any) -> Policy:
    """Two waves that hold every device."""
    return policy(waves=(Wave(gates=Gates(**{"min_reports": 10, **gates})), Wave()))


@given(policies(), outcomes, times)
def test_there_is_always_a_verdict_that_can_be_applied(
    rollout: Policy, reported: list[Outcome], now: datetime.datetime
) -> None:
    verdict = advance(rollout, reported, now)
    after = applied(rollout, verdict, now)
    if verdict.action in ("wait", "done"):
        assert after is rollout
    if verdict.action == "open":
        assert (after.opened, after.opened_at, after.state) == (rollout.opened + 1, now, "running")
    if verdict.action == "stop":
        assert (rollout.state, after.state) == ("running", rollout.on_failure)


def test_a_wave_opens_after_its_reports_and_its_soak() -> None:
    rollout = gated()
    assert advance(policy(opened=0), [], NOW).action == "open"
    assert "9 of 10 reports" in advance(rollout, of(9), LATER).reason
    assert "soaks for 3600 s" in advance(rollout, of(10), NOW).reason
    verdict = advance(rollout, of(10), LATER)
    assert (verdict.action, verdict.waits_for_person) == ("open", True)
    assert applied(rollout, verdict, LATER).opened == 2
    free = msgspec.structs.replace(
        rollout, waves=(msgspec.structs.replace(rollout.waves[0], hold=False),) * 2
    )
    assert not advance(free, of(10), LATER).waits_for_person
    assert advance(applied(free, verdict, NOW), of(10), LATER).action == "done"


@pytest.mark.parametrize(
    ("gates", "reported", "sentence"),
    [
        ({}, of(990, 10), "10 of 1000 devices rolled back, 0.50% may"),
        ({}, of(10, errors=0.02), "2.00% of requests failed, 1.00% may"),
        ({"min_quality": 0.9}, of(10, quality=0.5), "quality is 0.500, at least 0.900 must be"),
        ({}, of(10, speed=0.5), "tokens/s are 0.50 of before, at least 0.80 must be"),
        ({"patience_s": 60}, of(3), "has 3 of 10 reports after 60 s"),
    ],
)
def test_a_gate_that_is_missed_stops_at_once(
    gates: dict[str, Any], reported: list[Outcome], sentence: str
) -> None:
    now = NOW + datetime.timedelta(seconds=61)
    verdict = advance(gated(**gates), reported, now)
    assert verdict.action == "stop"
    assert sentence in verdict.reason
    after = applied(gated(**gates), verdict, now)
    assert (after.state, after.reason) == ("rolled_back", verdict.reason)
    calm = gated(soak_s=0, max_errors=None, max_rollbacks=None, min_speed=None, min_reports=0)
    assert advance(calm, reported, now).action == "open", "no gate, no stop"


def test_a_share_at_its_bound_passes_and_one_more_does_not() -> None:
    assert advance(gated(), of(995, 5), LATER).action == "open"
    assert advance(gated(), of(994, 6), LATER).action == "stop"


def test_a_number_that_nobody_reports_is_not_passed() -> None:
    assert "has reported quality" in advance(gated(min_quality=0.5), of(10), LATER).reason


def test_only_devices_of_open_waves_with_this_version_count() -> None:
    """Others may say what they like: no verdict moves."""
    rollout = policy(1, 100)
    inside = tally(rollout, of(2000)).reports
    assert 5 < inside < 40
    assert tally(rollout, of(2000, sha256=OLD.sha256)).reports == 0
    assert tally(rollout, of(2000, state="active")).reports == 0
    assert tally(rollout, of(2000, state="rolled_back", cause="superseded")).reports == 0
    assert tally(msgspec.structs.replace(rollout, opened=2), of(2000)).reports == 2000


def test_a_few_liars_move_nothing_but_their_number() -> None:
    """Two per cent with numbers as bad as the type allows, against honest ones."""
    lies = [outcome(1000 + n, errors=1.0, quality=0.0, speed=0.0) for n in range(2)]
    counted = tally(gated(), [*of(98, errors=0.0, quality=1.0, speed=1.0), *lies])
    assert counted.speed == 1.0
    assert counted.errors == pytest.approx(0.02)
    assert counted.quality == pytest.approx(0.98)


def test_a_rollout_that_does_not_run_is_not_judged() -> None:
    for rollout in (pause(gated()), stop(gated())):
        assert advance(rollout, of(0, 50), LATER).action == "wait"


def test_what_a_number_of_reports_can_see() -> None:
    assert detectable(0) == 1
    assert detectable(1) == pytest.approx(0.95)
    assert detectable(300) == pytest.approx(0.00993, abs=1e-4)
