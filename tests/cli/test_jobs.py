"""`lichen jobs`, with no daemon: what it shows and what it writes into a job."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lichen.adapters.events import EventLog, Finished, Measured, Started, Stepped
from lichen.adapters.jobs import Job, JobStore, Outcome, Status, begun, ended, new_job_id
from lichen.adapters.launch import EVENTS
from lichen.cli import app
from lichen.cli.jobs import PLOT_COLUMNS, drawn

RUNNER = CliRunner()


def made(home: Path, status: Status) -> Job:
    store = JobStore(home / "learning" / "jobs")
    job = store.create(
        Job(
            id=new_job_id(),
            owner="me",
            created=time.time(),
            model="tiny",
            name="mine",
            status=status,
        )
    )
    tell = EventLog(store.place(job.id) / EVENTS)
    tell(Measured("before", 3.0, 0.0, 2.0))
    tell(Started(0, 4, 8, 1e-3))
    for step in range(1, 4):
        tell(Stepped(step, 0, 3.0 - step / 2, 1e-3, 1.0, 120.0, 200.0))
    tell.close()
    return job


def lichen(home: Path, *arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["--home", str(home), "jobs", *arguments])
    said = result.output + (str(result.exception) if result.exception else "")
    return result.exit_code, said


def test_jobs_are_listed_with_their_progress(tmp_path: Path) -> None:
    assert "No jobs yet" in lichen(tmp_path, "list")[1]
    job = made(tmp_path, "running")
    code, said = lichen(tmp_path, "list")
    assert code == 0 and "tiny:mine" in said
    assert "step 3 of 4, loss 1.500" in " ".join(said.split())
    assert "120 tokens/s, 3 min left" in lichen(tmp_path, "show", job.id)[1]
    assert job.id in lichen(tmp_path, "list", "--json")[1]


def test_a_job_is_shown_with_its_measurements_and_its_curve(tmp_path: Path) -> None:
    job = made(tmp_path, "running")
    store = JobStore(tmp_path / "learning" / "jobs")
    outcome = Outcome(adapter="mine", digest="ab" * 32)
    store.change(job.id, lambda found: ended(begun(found), "succeeded", outcome=outcome))
    code, said = lichen(tmp_path, "show", job.id.removeprefix("ftjob-")[:8], "--plot")
    assert code == 0 and "held-out 3.000" in said and "abababababab" in said
    assert said.count("●") == 3
    assert lichen(tmp_path, "watch", job.id)[0] == 0
    assert "There is no job" in lichen(tmp_path, "show", "nothing")[1]


def test_wishes_need_no_daemon(tmp_path: Path) -> None:
    job = made(tmp_path, "queued")
    store = JobStore(tmp_path / "learning" / "jobs")
    assert "is paused" in lichen(tmp_path, "pause", job.id)[1]
    assert "is queued" in lichen(tmp_path, "resume", job.id)[1]
    store.change(job.id, begun)
    assert "will cancel" in lichen(tmp_path, "cancel", job.id)[1]
    assert "has not ended" in lichen(tmp_path, "remove", job.id)[1]
    store.change(job.id, lambda found: ended(found, "failed", error="It was too much."))
    assert "It was too much." in lichen(tmp_path, "watch", job.id)[1]
    assert lichen(tmp_path, "remove", job.id)[0] == 0
    assert store.jobs() == []


def test_a_short_id_must_be_of_one_job(tmp_path: Path) -> None:
    made(tmp_path, "queued")
    made(tmp_path, "queued")
    assert "2 jobs begin with" in lichen(tmp_path, "pause", "ftjob-")[1]
    assert lichen(tmp_path, "pause", "")[0] != 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_any_curve_is_drawn_within_its_frame(values: list[float]) -> None:
    lines = drawn(values).split("\n")
    assert len(lines) == 12
    assert sum(line.count("●") for line in lines) == min(PLOT_COLUMNS, len(values))


def test_what_a_resumed_trainer_tells_twice_counts_once(tmp_path: Path) -> None:
    job = made(tmp_path, "running")
    tell = EventLog(JobStore(tmp_path / "learning" / "jobs").place(job.id) / EVENTS)
    tell(Started(2, 4, 8, 1e-3))
    tell(Stepped(3, 0, 9.0, 1e-3, 1.0, 120.0, 1.0))
    tell(Finished("x", 1.0, 1))
    assert "step 3 of 4, loss 9.000" in lichen(tmp_path, "show", job.id)[1]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"event": "step"}\n', b"[1]\n" * 100])
def test_broken_events_hide_nothing(tmp_path: Path, content: bytes) -> None:
    job = made(tmp_path, "running")
    path = JobStore(tmp_path / "learning" / "jobs").place(job.id) / EVENTS
    path.write_bytes(path.read_bytes() + content)
    assert "step 3 of 4" in lichen(tmp_path, "show", job.id)[1]
