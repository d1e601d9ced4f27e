"""The runner of jobs when things go wrong: disks, daemons and trainers that die. No trainer is a real one."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import filelock
import msgspec
import pytest

from lichen.adapters import jobs, launch
from lichen.adapters.courtesy import Courtesy
from lichen.adapters.events import Stepped, told
from lichen.adapters.files import FileStore
from lichen.adapters.jobs import Job, JobStore, Status, new_job_id
from lichen.adapters.registry import Registry
from lichen.adapters.task import Example, Examples, Task
from lichen.errors import JournalError
from lichen.runtime import learning
from lichen.runtime.learning import Learning


class Quick(Learning):
    """Prepares a job without a model to write tokens with."""

    def _prepare(self, job: Job, model: Path) -> None:
        folder = self.store.place(job.id)
        task = Task(name=job.name, model=str(model), output=str(folder / "result"))
        launch.prepare(folder, task, Examples(train=[Example([1], [2])]))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PROGRAM", "tests.adapters.stand_in_trainer")
    monkeypatch.setattr(learning, "LOOK_S", 0.05)
    monkeypatch.setattr(learning, "RETRY_S", 0.1)


def runner(root: Path) -> Quick:
    async def locate(_name: str) -> Path:
        return root / "model.gguf"

    store, files = JobStore(root / "jobs"), FileStore(root / "files", limit=1 << 20)
    return Quick(store, files, Registry(root / "adapters"), locate=locate, busy=lambda: False)


@asynccontextmanager
async def running(learner: Learning) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(learner.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=20)
        assert task.done()


def made(store: JobStore, name: str = "steps-400", status: Status = "queued") -> Job:
    return store.create(
        Job(id=new_job_id(), owner="", created=time.time(), model="m", name=name, status=status)
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.02)


def steps(store: JobStore, job: Job) -> int:
    events = told(store.place(job.id) / launch.EVENTS)
    return sum(isinstance(one.event, Stepped) for one in events)


async def test_the_trainer_of_a_dead_daemon_is_waited_for(tmp_path: Path) -> None:
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store, status="running")
    async with running(learner):
        with filelock.FileLock(store.place(job.id) / launch.LOCK):
            await until(lambda: store.get(job.id).status == "queued")
            await asyncio.sleep(0.5)
            assert store.get(job.id).status == "queued"
        await until(lambda: steps(store, job) > 0)
        assert store.get(job.id).attempts == 1


async def test_it_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "ORPHAN_S", 0.1)
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store)
    with filelock.FileLock(store.place(job.id) / launch.LOCK):
        async with running(learner):
            await until(lambda: store.get(job.id).ended)
    assert "Another process has trained" in store.get(job.id).error


@pytest.mark.parametrize(("wish", "status"), [("cancel", "cancelled"), ("pause", "paused")])
async def test_a_wish_that_was_acknowledged_survives_the_end_of_the_daemon(
    tmp_path: Path, wish: jobs.Wish, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store)
    async with running(learner):
        await until(lambda: steps(store, job) > 0)
        monkeypatch.setattr(learning, "LOOK_S", 1.0)  # nobody looks before the end
        await asyncio.sleep(0.1)
        store.ask(job.id, wish)
        learner._ending.set()
    assert store.get(job.id).status == status


def refuse(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("refused", ["courtesy", "process"])
async def test_a_full_disk_fails_the_job_and_not_the_runner(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store)
    with monkeypatch.context() as patched:
        if refused == "courtesy":
            patched.setattr(learning, "Courtesy", refuse)
        else:
            patched.setattr("subprocess.Popen", refuse)
        async with running(learner) as task:
            await until(lambda: store.get(job.id).ended)
            patched.undo()
            monkeypatch.setattr(launch, "PROGRAM", "tests.adapters.stand_in_trainer")
            second = made(store)
            await until(lambda: steps(store, second) > 0)
            assert not task.done()
    failed = store.get(job.id)
    assert failed.status == "failed" and "No space left on device" in failed.error


async def test_a_disk_that_is_full_when_a_failure_is_recorded_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store, "fail")
    async with running(learner) as task:
        await until(lambda: store.get(job.id).status == "running")
        with monkeypatch.context() as patched:
            patched.setattr(jobs, "write_file", refuse)
            await asyncio.sleep(1.5)
            assert not task.done() and store.get(job.id).status == "running"
        await until(lambda: store.get(job.id).status == "failed")
        assert "no number" in store.get(job.id).error


async def test_no_trainer_is_left_when_its_job_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store)
    async with running(learner):
        await until(lambda: steps(store, job) > 0)
        read = store.get

        def broken(id: str, owner: str | None = None) -> Job:
            monkeypatch.setattr(store, "get", read)
            raise JournalError("Input/output error.")

        monkeypatch.setattr(store, "get", broken)
        await until(lambda: read(job.id).ended)
        assert read(job.id).error == "Input/output error."
        assert not launch.at_work(store.place(job.id))


def test_deaths_of_the_daemon_are_counted(tmp_path: Path) -> None:
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store)
    for _ in range(jobs.MAX_ATTEMPTS):
        assert store.change(job.id, jobs.begun).status == "running"
        learner._adopt()
    assert store.get(job.id).status == "failed" and "died 3 times" in store.get(job.id).error


async def test_a_trainer_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "CLOSING_S", 0.3)
    learner = runner(tmp_path)
    store, job = learner.store, made(learner.store, "deaf-steps-400")
    async with running(learner):
        await until(lambda: steps(store, job) > 0)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert store.get(job.id).status == "queued" and store.get(job.id).attempts == 0
    assert not launch.at_work(store.place(job.id))


async def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    class Slow(Quick):
        def _prepare(self, job: Job, model: Path) -> None:
            self.store.ask(job.id, "cancel")
            raise JournalError("The file is gone.")

    learner = runner(tmp_path)
    learner.__class__ = Slow
    store, job = learner.store, made(learner.store)
    async with running(learner):
        await until(lambda: store.get(job.id).ended)
        await asyncio.sleep(0.3)
    assert store.get(job.id).status == "cancelled" and not store.get(job.id).error


def test_nothing_to_learn_from_is_left_of_an_ended_job(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    job = made(store)
    for name in (jobs.LESSONS, launch.EXAMPLES, launch.CHECKPOINT, launch.EVENTS):
        (store.place(job.id) / name).write_bytes(b"secret\n")
    store.place(new_job_id()).mkdir()
    store.sweep()
    assert [path.name for path in store.folder.glob("ftjob-*")] == [job.id]
    store.ask(job.id, "cancel")
    assert sorted(path.name for path in store.place(job.id).iterdir()) == [launch.EVENTS, jobs.JOB]


def test_the_byte_is_shared(tmp_path: Path) -> None:
    one, two = Courtesy(tmp_path), Courtesy(tmp_path)
    for busy in (True, False):
        one.busy = busy
        assert two.busy == busy
    one.close()
    two.close()


def test_an_event_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / launch.EVENTS
    line = b'{"event":"step","step":%d,"epoch":0,"loss":1,"rate":1,"norm":1,"tokens_per_second":1,"left":1}\n'
    start = b'{"event":"started","step":1,"steps":9,"parameters":1,"rate":1}\n'
    path.write_bytes(line % 1 + line % 2 + b"broken\n" + line % 3)
    before = {msgspec.json.encode(one.event): one.line for one in told(path)}
    path.write_bytes(path.read_bytes() + start + line % 2)
    after = told(path)
    assert [one.line for one in after] == [0, 4, 5]
    assert before[msgspec.json.encode(after[0].event)] == 0
