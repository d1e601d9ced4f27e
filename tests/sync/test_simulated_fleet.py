"""A fleet in virtual time: a version that fails on some devices is stopped, and nobody is left in between."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.simulated_device import DAY, SLOT, START, World
from bench.simulated_fleet import SimulatedFleet
from lichen.sync.rollout import DeviceFacts, Gates, wave_of
from lichen.sync.updates.states import LAST


async def stopped_in_the_first_wave(folder: Path, world: World) -> None:
    """The rollout of a version that fails on `world.faulty` of the devices, and what is left of it."""
    fleet = SimulatedFleet(folder, world)
    await fleet.run()
    policy = fleet.policy()
    assert (policy.state, policy.opened) == ("rolled_back", 1), fleet.steps
    assert "devices rolled back" in policy.reason
    took = [each for each in fleet.devices if each.update is not None]
    first = [each for each in fleet.devices if wave_of(policy, DeviceFacts(id=each.key.id)) == 0]
    assert {each.number for each in took} <= {each.number for each in first}, "nobody beyond the first wave"
    assert len(took) > len(first) * 0.3, "it stops as soon as enough is known"
    ends = Counter[str]()
    for each in fleet.devices:
        off = each.dark_from is not None
        update = each.update
        ends["none" if update is None else update.state] += 1
        assert update is None or update.ended or off, "only who is off for good is still at it"
        assert each.active == fleet.old.sha256 or off
        assert each.active in (fleet.old.sha256, fleet.new.sha256)
    assert ends["none"] == world.devices - len(took)
    assert set(ends) - {"none"} <= {*LAST, "downloading", "active"}
    reported = {each.device for each in fleet.database.reported(SLOT) if each.failed}
    judged = {each.key.id for each in fleet.devices if each.refused}
    assert reported <= judged
    assert len(judged - reported) <= len([each for each in took if each.dark_from is not None])


async def test_a_bad_version_is_stopped_in_a_small_fleet(tmp_path: Path) -> None:
    """400 devices, a tenth of which it fails on; a week."""
    gates = Gates(max_rollbacks=0.02, min_reports=20, soak_s=DAY)
    world = World(devices=400, faulty=0.1, days=9, waves=(10, 100), gates=gates, size=20_000)
    await stopped_in_the_first_wave(tmp_path, world)


async def test_a_good_version_reaches_everybody_who_can_be_reached(tmp_path: Path) -> None:
    gates = Gates(max_rollbacks=0.02, min_reports=10, soak_s=DAY)
    world = World(devices=150, faulty=0, days=9, waves=(20, 100), gates=gates, size=20_000)
    fleet = SimulatedFleet(tmp_path, world)
    await fleet.run()
    policy = fleet.policy()
    assert (policy.state, policy.complete) == ("running", True)
    late = [each for each in fleet.devices if each.active != fleet.new.sha256]
    assert all(each.dark_from is not None or each.reachable(fleet.now) > fleet.now for each in late)
    assert len(late) < 15
    assert fleet.costs.requests["payload"] >= 150 - len(late)
    assert START < fleet.now <= START + world.days * DAY


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_two_per_cent_of_ten_thousand_devices_stop_a_rollout(tmp_path: Path) -> None:
    await stopped_in_the_first_wave(tmp_path, World(devices=10_000, faulty=0.02))
