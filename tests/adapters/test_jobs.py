"""Jobs on the disk: what was acknowledged stays, and no wish leads into a state that makes no sense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.adapters import jobs
from lichen.adapters.jobs import ENDED, JOB, Job, JobStore, Status, Wish, new_job_id, wanted
from lichen.errors import JournalError, JournalFull, NotFound, RequestError

WISHES: tuple[Wish, ...] = ("pause", "resume", "cancel")
STATES: tuple[Status, ...] = (
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled",
)  # fmt: skip


def job(owner: str = "me", status: Status = "queued") -> Job:
    return Job(id=new_job_id(), owner=owner, created=time.time(), model="m", name="mine", status=status)


def test_a_job_is_there_for_its_owner_only(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    mine, theirs = store.create(job()), store.create(job("you"))
    assert store.get(mine.id, "me") == mine == store.get(mine.id)
    assert [one.id for one in store.jobs("you")] == [theirs.id]
    assert {one.id for one in store.jobs()} == {mine.id, theirs.id}
    for id in (theirs.id, "ftjob-" + "0" * 24, "../x", "ftjob-../../etc", ""):
        with pytest.raises(NotFound, match="There is no job"):
            store.get(id, "me")
    assert store.place(mine.id).stat().st_mode & 0o077 == 0


def test_a_damaged_job_is_named_and_hides_no_other(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    one, two = store.create(job()), store.create(job())
    (store.place(one.id) / JOB).write_bytes(b'{"id": ')
    assert [found.id for found in store.jobs()] == [two.id]
    with pytest.raises(JournalError, match=one.id):
        store.get(one.id)
    (store.place(one.id) / JOB).write_bytes((store.place(two.id) / JOB).read_bytes())
    with pytest.raises(JournalError, match="another job"):
        store.get(one.id)


def test_there_is_an_end_to_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_JOBS", 2)
    store = JobStore(tmp_path)
    first = store.create(job(status="failed"))
    store.create(job())
    with pytest.raises(JournalFull, match="too many jobs"):
        store.create(job())
    store.remove(first.id, "me")
    running = store.create(job())
    with pytest.raises(RequestError, match="has not ended"):
        store.remove(running.id)


@given(st.sampled_from(STATES), st.lists(st.sampled_from([*WISHES, "begin", "stop", "die"]), max_size=12))
def test_whatever_happens_to_a_job_it_stays_what_it_may_be(status: Status, happenings: list[str]) -> None:
    now, deaths = job(status=status), 0
    for happening in happenings:
        before = now
        if happening in WISHES:
            try:
                now = wanted(now, happening)
            except RequestError as error:
                assert error.message
        elif happening == "begin":
            now = jobs.begun(now)
        elif now.status == "running":
            deaths += happening == "die"
            now = jobs.interrupted(now) if happening == "die" else jobs.stopped(now)
        if before.ended:
            assert now == before, "an end is an end"
        assert now.asked is None or now.status == "running"
        assert status in ENDED or (now.finished is not None) == now.ended
        assert deaths < jobs.MAX_ATTEMPTS or now.ended


KILLED = """
import sys, time
from pathlib import Path
from lichen.adapters.jobs import Job, JobStore, new_job_id
store = JobStore(Path(sys.argv[1]))
while True:
    job = store.create(Job(id=new_job_id(), owner="me", created=time.time(), model="m", name="n"))
    store.ask(job.id, "pause")
    print(job.id, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    for round in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(4 + round)]
        os.kill(process.pid, signal.SIGKILL)
        told += process.stdout.read().split()
        process.wait()
        process.stdout.close()
        store = JobStore(tmp_path)
        for id in told:
            assert store.get(id).status == "paused"
        assert all(one.name == "n" for one in store.jobs())
