"""When a machine may work on updates: every rule, each way, and what the system does not tell."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from lichen.errors import ConfigError
from lichen.sync.manifest import make_manifest
from lichen.sync.updates import schedule
from lichen.sync.updates.schedule import Facts, Rules, waits
from lichen.sync.updates.states import STATES, Update
from tests.sync.hostile_repository import manifest

NOON = datetime.time(12)


def update(state: Any) -> Update:
    return Update(
        id=1,
        slot="models/it",
        target="models/it",
        sha256="a" * 64,
        size=1,
        manifest=make_manifest(manifest("models/it", 1), running="0.1"),
        state=state,
        begun=0,
        entered=0,
    )


@pytest.mark.parametrize(
    ("rules", "facts", "held"),
    [
        ({}, {}, set()),
        ({}, {"metered": True}, {"offered", "downloading"}),
        ({"metered": True}, {"metered": True}, set()),
        ({}, {"on_battery": True}, {"offered", "downloading", "staged"}),
        ({"battery": True}, {"on_battery": True, "charge": 0.9}, set()),
        ({"battery": True}, {"on_battery": True, "charge": 0.1}, {"offered", "downloading", "staged"}),
        ({"window": "22:00-06:00"}, {}, {"offered", "downloading", "staged"}),
        ({"window": "22:00-06:00"}, {"at": datetime.time(23)}, set()),
        ({"window": "22:00-06:00"}, {"at": datetime.time(5, 59)}, set()),
        ({"window": "11:00-13:00"}, {}, set()),
        ({"window": "13:00-14:00"}, {}, {"offered", "downloading", "staged"}),
        ({"window": "12:00-12:00"}, {"at": datetime.time(3)}, set()),
    ],
)
def test_rules(rules: dict[str, Any], facts: dict[str, Any], held: set[str]) -> None:
    known = Facts(**({"at": NOON} | facts))
    waiting = {state for state in STATES if waits(Rules(**rules), known, update(state))}
    assert waiting == held


@pytest.mark.parametrize("window", ["x", "22:00", "25:00-26:00", "22:00-06:00-07:00", "-"])
def test_a_window_that_is_none_is_said(window: str) -> None:
    with pytest.raises(ConfigError, match="is no window"):
        waits(Rules(window=window), Facts(at=NOON), update("offered"))


@pytest.mark.parametrize(("said", "metered"), [("u 1\n", True), ("u 4", False), ("u 0", None), ("", None)])
def test_what_the_system_says_of_the_connection(
    monkeypatch: pytest.MonkeyPatch, said: str, metered: bool | None
) -> None:
    monkeypatch.setattr(schedule, "_METERED", ("printf", said.replace("\n", "\\n") or "%s"))
    assert schedule.look().metered is metered
    monkeypatch.setattr(schedule, "_METERED", ("/nonexistent",))
    assert schedule.look().metered is None
