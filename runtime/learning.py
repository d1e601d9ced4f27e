"""Runs the jobs of learning in a daemon: one trainer at a time, polite to whoever chats meanwhile.

    queued -> running -> succeeded | failed | cancelled, and paused on the way where somebody wants it

The jobs lie in `adapters/jobs.py`; here they are carried out. What was running when a daemon died is queued
again and goes on from its last checkpoint. Of several daemons over one folder, one runs its jobs.
While requests run the trainer waits between the parts of a step (`adapters/courtesy.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

import filelock
import msgspec

from lichen.adapters import jobs
from lichen.adapters.courtesy import Courtesy
from lichen.adapters.events import Event, Stepped
from lichen.adapters.files import FileStore
from lichen.adapters.jobs import Job, JobStore, Outcome
from lichen.adapters.launch import Training, prepare
from lichen.adapters.lessons import survey
from lichen.adapters.lineage import ADAPTER, lineage_of
from lichen.adapters.registry import Registry
from lichen.adapters.task import Examples, LoRAOptions, Task
from lichen.adapters.versions import Version
from lichen.errors import LichenError, RequestError, TrainingError
from lichen.sync.download import hash_file

log = logging.getLogger("lichen.learning")

LOOK_S = 0.5  # between two looks for a job, or for what its owner wants
BUSY_LOOK_S = 0.05
QUIET_S = 0.3  # without a request before the trainer goes on
LENGTH = 1024  # tokens of an example
RUNNER_LOCK = ".runner"
Locate = Callable[[str], Awaitable[Path]]


class Learning:
    """The jobs of one daemon.

    locate: the file of a model by name; raises NotFound. busy: whether requests run now. threads: of a
    trainer. memory: bytes that it may take.
    """

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        registry: Registry,
        *,
        locate: Locate,
        busy: Callable[[], bool],
        threads: int = 1,
        memory: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store, self._files, self._registry = store, files, registry
        self._locate, self._busy = locate, busy
        self._threads, self._memory = threads, memory
        self.latest: Stepped | None = None  # of the training that runs
        self._tokens = 0.0

    async def run(self) -> None:
        """Carry out jobs until cancelled. A running trainer is then asked to keep a checkpoint and end."""
        lock = filelock.FileLock(self.store.folder / RUNNER_LOCK, timeout=0)
        await asyncio.to_thread(self.store.folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(filelock.Timeout):
                lock.acquire()
                break
            await asyncio.sleep(10 * LOOK_S)
        try:
            await asyncio.to_thread(self._adopt)
            while True:
                job = await asyncio.to_thread(self._next)
                if job is None:
                    await asyncio.sleep(LOOK_S)
                else:
                    await self._carry_out(job)
        finally:
            lock.release()

    def _adopt(self) -> None:
        """What another daemon left running waits for its turn again."""
        for job in self.store.jobs():
            if job.status == "running":
                self.store.change(job.id, _stopped if job.asked else _requeued)

    def _next(self) -> Job | None:
        waiting = [job for job in self.store.jobs() if job.status in ("queued", "validating_files")]
        return waiting[-1] if waiting else None

    async def _carry_out(self, job: Job) -> None:
        try:
            model = await self._locate(job.model)
            await asyncio.to_thread(self._prepare, job, model)
            job = await asyncio.to_thread(self.store.change, job.id, _started)
            if job.status == "running":
                await self._train(job, model)
        except LichenError as error:
            log.warning("The job %s failed: %s", job.id, error.message)
            how = functools.partial(jobs.ended, status="failed", error=str(error), param=error.param or "")
            await asyncio.to_thread(self.store.change, job.id, how)
        finally:
            self.latest = None

    def _prepare(self, job: Job, model: Path) -> None:
        """Write what the trainer reads. Raises LichenError for files that cannot be learned from."""
        from lichen.runtime.teaching import examples_of

        lessons = Path(job.lessons) if job.lessons else self._files.content(job.training, job.owner)
        report = survey(lessons)
        report.require_sound()
        if (report.kind == "preference") != (job.objective == "preference"):
            raise RequestError(
                f"The file holds lessons of the kind {report.kind}, which the method cannot learn from.",
                hint="Preference pairs go with the method dpo, everything else with supervised.",
                param="training_file",
            )
        validation = self._files.content(job.validation, job.owner) if job.validation else None
        examples, told = examples_of(lessons, model, LENGTH, validation=validation)
        for sentence in told:
            log.info("Job %s: %s", job.id, sentence)
        prepare(self.store.place(job.id), self._task(job, model, lessons, examples), examples)

    def _task(self, job: Job, model: Path, lessons: Path, examples: Examples) -> Task:
        wanted = job.hyperparameters
        rank = wanted.rank or LoRAOptions().rank
        task = Task(
            name=job.name,
            model=str(model.resolve()),
            output=str((self.store.place(job.id) / "result").resolve()),
            lessons=hash_file(lessons),
            lora=LoRAOptions(rank=rank, alpha=2.0 * rank),
            objective=job.objective,
            minutes=wanted.minutes,
            seed=job.seed,
            threads=self._threads,
            memory=self._memory(),
        )
        given = {
            "epochs": wanted.epochs,
            "batch": wanted.batch,
            "beta": wanted.beta,
            "multiplier": wanted.multiplier,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return msgspec.structs.replace(task, **chosen)

    async def _train(self, job: Job, model: Path) -> None:
        folder = self.store.place(job.id)
        courtesy = Courtesy(folder)
        training = await asyncio.to_thread(Training, folder)
        self._tokens = 0.0
        following = asyncio.ensure_future(asyncio.to_thread(self._follow, training))
        polite = asyncio.ensure_future(self._be_polite(courtesy))
        try:
            while not following.done():
                await asyncio.wait([following], timeout=LOOK_S)
                if (await asyncio.to_thread(self.store.get, job.id)).asked in ("pause", "cancel"):
                    training.stop()
            await self._end(job, model, following)
        except asyncio.CancelledError:  # the daemon ends: the job goes on when there is one again
            training.stop()
            await asyncio.to_thread(training.process.wait)
            await asyncio.to_thread(self.store.change, job.id, _requeued)
            raise
        finally:
            polite.cancel()
            courtesy.close()

    async def _end(self, job: Job, model: Path, following: asyncio.Future[Path | None]) -> None:
        """What becomes of a job whose trainer has ended. Raises what the trainer failed with."""
        try:
            place = following.result()
        except TrainerDied as error:
            log.warning("The trainer of the job %s died: %s", job.id, error.message)
            await asyncio.to_thread(self.store.change, job.id, jobs.interrupted)
            return
        if place is None:
            await asyncio.to_thread(self.store.change, job.id, _stopped)
            return
        await asyncio.to_thread(self._register, job, model, place)

    def _follow(self, training: Training) -> Path | None:
        """Read a trainer's events to the end; its result, or None where it was stopped. Blocks."""
        place: Path | None = None
        told = False
        try:
            for event in training:
                told = told or event_ends(event)
                place = self._note(event) or place
        except TrainingError as error:
            raise error if told else TrainerDied(error.message, hint=error.hint) from None
        return place

    def _note(self, event: Event) -> Path | None:
        from lichen.adapters.events import Finished

        if isinstance(event, Stepped):
            if self.latest is not None and event.step > self.latest.step:
                self._tokens += event.tokens_per_second * max(0.0, self.latest.left - event.left)
            self.latest = event
        return Path(event.folder) if isinstance(event, Finished) else None

    def _register(self, job: Job, model: Path, place: Path) -> None:
        lineage = lineage_of(place, base_name=job.model, lessons=[job.training] if job.training else [])
        version = self._registry.add(job.name, place / ADAPTER, lineage, model=model)
        shutil.rmtree(place, ignore_errors=True)  # the registry has it
        if is_better(version):
            self._registry.promote(job.name, version.digest)
        outcome = Outcome(adapter=job.name, digest=version.digest, tokens=round(self._tokens))
        self.store.change(job.id, functools.partial(jobs.ended, status="succeeded", outcome=outcome))

    async def _be_polite(self, courtesy: Courtesy) -> None:
        """Keep the byte true: busy while requests run, and a moment longer."""
        loop = asyncio.get_running_loop()
        last = -QUIET_S
        while True:
            if self._busy():
                last = loop.time()
            courtesy.busy = loop.time() - last < QUIET_S
            await asyncio.sleep(BUSY_LOOK_S)


def require_torch() -> None:
    """Raise TrainingError where torch is not installed."""
    if find_spec("torch") is None:
        raise TrainingError(
            "Learning needs torch, which is not installed.", hint="pip install 'lichen[train]'"
        )


def is_better(version: Version) -> bool:
    """Whether a version answers what it was not taught with better than the model does."""
    before, after = version.lineage.scores["before"], version.lineage.scores["after"]
    return before["loss"] is not None and after["loss"] < before["loss"]


class TrainerDied(TrainingError):
    """The trainer's process ended without a word: killed, or out of memory."""


def event_ends(event: Event) -> bool:
    """Whether a trainer says with it how it ended."""
    from lichen.adapters.events import Failed, Finished, Stopped

    return isinstance(event, Failed | Finished | Stopped)


def _started(job: Job) -> Job:
    """Unless its owner changed his mind while it was prepared."""
    return jobs.begun(job) if job.status in ("queued", "validating_files") else job


def _requeued(job: Job) -> Job:
    return job if job.ended else msgspec.structs.replace(job, status="queued", asked=None)


def _stopped(job: Job) -> Job:
    """Its trainer kept a checkpoint and ended, as somebody asked."""
    if job.asked == "cancel":
        return jobs.ended(job, "cancelled")
    status: jobs.Status = "paused" if job.asked == "pause" else "queued"
    return msgspec.structs.replace(job, status=status, asked=None)
