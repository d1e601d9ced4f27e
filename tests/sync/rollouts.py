"""Made-up rollouts, devices and outcomes, for tests of what follows from them."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

from hypothesis import strategies as st

from lichen.sync.gates import Outcome
from lichen.sync.rollout import DeviceFacts, Gates, Policy, Release, Wave

NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)
OLD = Release(version="1", path="adapters/support-1", sha256="1" * 64)
NEW = Release(version="2", path="adapters/support-2", sha256="2" * 64)


def policy(*percents: float, **fields: Any) -> Policy:
    """A rollout of version 2 in waves of these percentages, the first of them open."""
    waves = tuple(Wave(percent=percent, gates=Gates(min_reports=10)) for percent in percents or (1, 10, 100))
    given: dict[str, Any] = {"waves": waves, "opened": 1, "opened_at": NOW, "previous": OLD} | fields
    return Policy(kind="adapters", name="support", version=NEW, **given)


def device_id(number: int) -> str:
    """An id as devices have them."""
    return hashlib.sha256(f"device {number}".encode()).hexdigest()


def outcome(number: int, **fields: Any) -> Outcome:
    """A device that is content with version 2."""
    return Outcome(device=device_id(number), **({"sha256": NEW.sha256, "state": "confirmed"} | fields))


digests = st.sampled_from([OLD.sha256, NEW.sha256, "3" * 64])
tags = st.dictionaries(st.sampled_from(["site", "ring"]), st.sampled_from(["oslo", "lima"]))
hardware = st.sampled_from(["", "small", "large"])
times = st.datetimes(timezones=st.just(datetime.UTC))
facts = st.builds(
    DeviceFacts,
    id=st.text(max_size=80) | st.integers(0, 10_000).map(device_id),
    tags=tags,
    hardware=hardware,
    active=st.none() | digests,
    refused=st.frozensets(digests),
)
waves = st.builds(
    Wave,
    percent=st.floats(0, 100, exclude_min=True),
    tags=tags,
    hardware=st.just(()) | hardware.filter(bool).map(lambda one: (one,)),
    gates=st.builds(
        Gates,
        max_errors=st.none() | st.floats(0, 1),
        max_rollbacks=st.none() | st.floats(0, 1),
        min_quality=st.none() | st.floats(0, 1),
        min_speed=st.none() | st.floats(0, 2),
        min_reports=st.integers(0, 8),
        soak_s=st.floats(0, 1e6),
        patience_s=st.none() | st.floats(0, 1e6),
    ),
    spread_s=st.just(0.0) | st.floats(0, 3e9),
    hold=st.booleans(),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that `read_policy` would take."""
    chosen = draw(st.lists(waves, min_size=1, max_size=4))
    return Policy(
        kind="adapters",
        name="support",
        version=NEW,
        previous=draw(st.none() | st.just(OLD)),
        waves=tuple(chosen),
        opened=draw(st.integers(0, len(chosen))),
        opened_at=draw(times),
        state=draw(st.sampled_from(["running", "paused", "stopped", "rolled_back"])),
        on_failure=draw(st.sampled_from(["stopped", "rolled_back"])),
        salt=draw(st.sampled_from(["", "another"])),
    )


outcomes = st.lists(
    st.builds(
        Outcome,
        device=st.integers(0, 10_000).map(device_id),
        sha256=digests,
        state=st.sampled_from(["offered", "downloading", "confirmed", "rolled_back"]),
        cause=st.sampled_from(["", "cancelled", "superseded", "unhealthy", "timed_out"]),
        tags=tags,
        hardware=hardware,
        errors=st.none() | st.floats(0, 1),
        quality=st.none() | st.floats(0, 1),
        speed=st.none() | st.floats(0, 1e6),
    ),
    max_size=30,
)
