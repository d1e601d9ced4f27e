"""`lichen top` and `lichen ps`: what they say of models, from two looks at a daemon."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lichen.cli.top import COLUMNS, Sample, draft_lines, frame, row
from tests.cli.test_commands import lichen
from tests.conftest import RunningDaemon

MODEL: dict[str, Any] = {
    "name": "m",
    "state": "ready",
    "progress": 1.0,
    "slots": {"busy": 1, "total": 4},
    "queue": {"waiting": 2, "limit": 64},
    "kv": {"cells_used": 50, "cells_total": 200},
    "counters": {
        "completion_tokens": 100,
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "first_tokens": 1,
        "ttft_s": 0.1,
    },
    "measured_bytes": 5_000_000,
    "estimate": {"total": 9_000_000},
    "idle_s": None,
}
LATER = MODEL | {
    "counters": {
        "completion_tokens": 150,
        "prompt_tokens": 70,
        "cached_tokens": 20,
        "first_tokens": 3,
        "ttft_s": 0.5,
        "draft_tokens": 8,
        "draft_accepted": 6,
    }
}
LOADING = MODEL | {
    "state": "loading",
    "progress": 0.4,
    "slots": {},
    "queue": {},
    "kv": {},
    "counters": {},
    "measured_bytes": 0,
}


def test_drafts_are_drawn_by_minute() -> None:
    minutes = [
        {"minutes_ago": 4, "drafted": 10, "accepted": 1},
        {"minutes_ago": 3, "drafted": 100, "accepted": 60},
        {"minutes_ago": 0, "drafted": 8, "accepted": 8},
    ]
    (line,) = draft_lines("m", MODEL | {"drafts": minutes})
    assert line == "drafts of m by minute |▁▅  █| 58% of 118 right"
    assert draft_lines("m", MODEL) == []


def test_rates_come_from_the_difference_of_counters() -> None:
    assert row(MODEL, LATER, 2.0) == (
        ("m", "ready", "1/4", "2", "25.0", "20.0", "75%", "200 ms", "25%", "5 MB", "-")
    )
    assert row(LATER, LATER, 2.0)[4:8] == ("0.0", "0.0", "-", "-")
    assert row(LATER, MODEL, 2.0)[4] == "0.0", "a model that was loaded anew counts from zero"
    assert row(None, MODEL, 2.0)[4] == row(MODEL, MODEL, 0.0)[4] == "-"
    assert row(None, LOADING, 1.0) == ("m", "40%", "-", "-", "-", "-", "-", "-", "-", "9 MB", "-")


@pytest.mark.parametrize("width", [40, 100])
def test_a_frame_has_a_line_for_each_model(width: int) -> None:
    status = {
        "version": "1",
        "state": "ok",
        "uptime_s": 3.0,
        "rss_bytes": 1e9,
        "available_bytes": 2e9,
        "models": [MODEL, LOADING | {"name": "n"}],
    }
    sample, page = Sample(status, 1.0), io.StringIO()
    Console(width=width, file=page).print(frame(sample, sample))
    lines = page.getvalue().splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["m", "n"]
    assert "memory 1.00 GB, 2.00 GB left" in " ".join(page.getvalue().split())
    assert len(COLUMNS) == len(row(None, MODEL, 1.0))


def test_both_against_a_daemon(tmp_path: Path, daemon: RunningDaemon) -> None:
    port = daemon.url.rpartition(":")[2]
    top = lichen("top", "--once", "--interval", "0.2", home=tmp_path, LICHEN_PORT=port, COLUMNS="160")
    assert top.returncode == 0, top.stderr
    assert daemon.model in top.stdout
    assert "0/8" in top.stdout
    ps = lichen("ps", home=tmp_path, LICHEN_PORT=port, COLUMNS="200")
    assert "pinned" in ps.stdout
    assert "8 x 4096" in ps.stdout
    missing = lichen("top", "--once", home=tmp_path)
    assert missing.returncode == 1
    assert "No lichen daemon answers" in missing.stderr
