"""The soak itself: twenty seconds of it, and that it would notice what it is for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import soak


@pytest.mark.slow
def test_twenty_seconds_of_mixed_load_leave_nothing_behind(
    model_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Twenty seconds are too short to tell a leak from warming up, so the limit is wide.
    short = ("--minutes", "0.33", "--every", "2", "--context", "512", "--limit", "15", "--no-save")
    code = soak.main(["--model", str(model_path), *short])
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert said["faults"] == []
    assert set(said["left_behind"].values()) == {0}
    assert sum(said["requests"].values()) > 15
    assert len(said["requests"]) >= 6
    assert code == 0, said


def look(rss: float) -> dict[str, Any]:
    return {
        "status": "ok",
        "rss_mb": rss,
        "tasks": 3,
        "free_slots": 0,
        "cells": 100,
        "ttft_p95_ms": 9.0,
        "gap_p95_ms": None,
    }


RECORD: dict[str, Any] = {
    "status": "ok",
    "settings": {"limit": 3},
    "runs": [look(300), *[look(500)] * 20],
    "faults": [],
    "left_behind": {"tasks": 0, "busy slots": 0},
}


def test_steady_memory_passes_and_warming_up_does_not_count() -> None:
    record = copy.deepcopy(RECORD)
    soak.conclude(record)
    assert record["status"] == "ok"
    assert record["drift"]["resident memory, MB"] == {"first": 500, "last": 500, "change": 0}
    assert record["drift"]["gap p95, ms"]["change"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"runs": [look(500 + 2 * minute) for minute in range(60)]},
        {"left_behind": {"tasks": 1}},
        {"faults": ["chat: HTTP 500"]},
    ],
)
def test_a_leak_is_noticed(change: dict[str, Any]) -> None:
    record = copy.deepcopy(RECORD) | change
    soak.conclude(record)
    assert record["status"] == "failed"
