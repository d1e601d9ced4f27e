"""Runs the jobs of learning in a daemon: one trainer at a time, polite to whoever chats meanwhile.

    queued -> running -> succeeded | failed | cancelled, and paused on the way where somebody wants it

The jobs lie in `adapters/jobs.py`; here they are carried out. What was running when a daemon died is queued
again and goes on from its last checkpoint. Of several daemons over one folder, one runs its jobs.
While requests run the trainer waits between the parts of a step (`adapters/courtesy.py`).

Whatever goes wrong with a job ends that job, and never the runner: a disk that refuses even to record it
is asked again until it takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

import filelock
import msgspec

from lichen.adapters import jobs
from lichen.adapters.courtesy import Courtesy
from lichen.adapters.events import Event, Stepped
from lichen.adapters.files import FileStore
from lichen.adapters.gate import Judged, Limits
from lichen.adapters.jobs import Job, JobStore, Outcome
from lichen.adapters.launch import Training, at_work, prepare
from lichen.adapters.lessons import survey
from lichen.adapters.lineage import enter
from lichen.adapters.registry import Registry
from lichen.adapters.task import Examples, LoRAOptions, Task
from lichen.adapters.thread import JournalThread
from lichen.errors import JournalFull, LichenError, NotFound, RequestError, TrainingError
from lichen.runtime.gating import let_decide
from lichen.sync.download import hash_file

log = logging.getLogger("lichen.learning")

LOOK_S = 0.5  # between two looks for a job, or for what its owner wants
BUSY_LOOK_S = 0.05
QUIET_S = 0.3  # without a request before the trainer goes on
RETRY_S = 5.0  # before a disk is asked again
RETRIES = 5  # for what is not a full disk
ORPHAN_S = 600.0  # that the trainer of a daemon that died gets to finish its step
CLOSING_S = 10.0  # that a trainer gets for it when the daemon ends
LENGTH = 1024  # tokens of an example
RUNNER_LOCK = ".runner"
Locate = Callable[[str], Awaitable[Path]]


class Learning:
    """The jobs of one daemon.

    locate: the file of a model by name; raises NotFound. busy: whether requests run now. threads: of a
    trainer. memory: bytes that it may take. journal: is told which adapter learned from what.
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
        journal: JournalThread | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.store, self.registry, self._files = store, registry, files
        self._locate, self._busy = locate, busy
        self._threads, self._memory, self._journal = threads, memory, journal
        self._limits = limits or Limits()  # of the gate
        self.latest: Stepped | None = None  # of the training that runs
        self.runs = False  # whether it is this daemon that runs the folder's jobs
        self._tokens = 0.0
        self._ending = asyncio.Event()

    async def run(self) -> None:
        """Carry out jobs until cancelled; a trainer then gets CLOSING_S to keep a checkpoint and end."""
        work = asyncio.ensure_future(self._run())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:  # nothing is cut off: what is at work sees `_ending`
            self._ending.set()
            await asyncio.wait([work])
            raise

    async def _run(self) -> None:
        lock = filelock.FileLock(self.store.folder / RUNNER_LOCK, timeout=0)
        try:
            while not self._ending.is_set():
                try:
                    if not self.runs:
                        self.store.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                        lock.acquire()
                        await asyncio.to_thread(self._adopt)
                        self.runs = True
                    job = await asyncio.to_thread(self._next)
                except filelock.Timeout:
                    await self._rest(RETRY_S)
                except (LichenError, OSError) as error:
                    log.warning("The jobs cannot be read, which is tried again: %s", error)
                    await self._rest(RETRY_S)
                else:
                    await (self._rest(LOOK_S) if job is None else self._carry_out(job))
        finally:
            self.runs = False
            lock.release(force=True)

    async def _rest(self, seconds: float) -> None:
        """Let time pass, but not once the daemon ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    def _adopt(self) -> None:
        """What another daemon left running when it died waits for its turn again, but not for ever."""
        self.store.sweep()
        for job in self.store.jobs():
            if job.status == "running":
                self.store.change(job.id, jobs.interrupted)

    def _next(self) -> Job | None:
        waiting = [job for job in self.store.jobs() if job.status in ("queued", "validating_files")]
        return waiting[-1] if waiting else None

    async def _carry_out(self, job: Job) -> None:
        try:
            model = await self._locate(job.model)
            if not await self._alone(job):
                return
            await asyncio.to_thread(self._prepare, job, model)
            if self._ending.is_set():
                return
            job = await asyncio.to_thread(self.store.change, job.id, jobs.begun)
            if job.status == "running":
                await self._train(job, model)
        except Exception as error:  # also a defect of ours: the other jobs must not wait for ever
            reason = _in_words(error)
            log.warning("The job %s failed: %s", job.id, reason, exc_info=reason is not error)
            await self._record(job.id, functools.partial(jobs.failed, error=reason))
        finally:
            self.latest = None

    async def _record(self, id: str, how: Callable[[Job], Job]) -> None:
        """Change a job, however long the disk is full; what cannot be recorded stays as it is."""
        tries = 0
        while True:
            try:
                await asyncio.to_thread(self.store.change, id, how)
            except NotFound:  # it was removed
                return
            except LichenError as error:
                tries += not isinstance(error, JournalFull)
                log.error("What became of the job %s cannot be recorded: %s", id, error)
                if tries > RETRIES or self._ending.is_set():
                    return
                await self._rest(RETRY_S)
            else:
                return

    async def _alone(self, job: Job) -> bool:
        """Wait until no other trainer holds the folder: one whose daemon died takes its last step there.

        False where the daemon ends meanwhile. Raises TrainingError after ORPHAN_S.
        """
        deadline = time.monotonic() + ORPHAN_S
        while await asyncio.to_thread(at_work, self.store.place(job.id)):
            if self._ending.is_set():
                return False
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"Another process has trained the job {job.id} for {ORPHAN_S / 60:.0f} minutes.",
                    hint="End it, and make the job again.",
                )
            await self._rest(LOOK_S)
        return True

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
            output=str((self.store.place(job.id) / jobs.RESULT).resolve()),
            lessons=hash_file(lessons),
            lora=LoRAOptions(rank=rank, alpha=2.0 * rank),
            objective=job.objective,
            minutes=wanted.minutes,
            seed=job.seed,
            threads=self._threads,
            memory=job.memory or self._memory(),
        )
        given = {
            "epochs": wanted.epochs,
            "batch": wanted.batch,
            "beta": wanted.beta,
            "multiplier": wanted.multiplier,
            "cache": job.disk or None,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return msgspec.structs.replace(task, **chosen)

    async def _train(self, job: Job, model: Path) -> None:
        courtesy = await asyncio.to_thread(Courtesy, self.store.place(job.id))
        polite = asyncio.ensure_future(self._be_polite(courtesy))
        try:
            place = await self._trained(job)
        except TrainerDied as error:
            log.warning("The trainer of the job %s died: %s", job.id, error.message)
            await self._record(job.id, jobs.interrupted)
            return
        finally:
            polite.cancel()
            await asyncio.gather(polite, return_exceptions=True)
            courtesy.close()
        wish = (await asyncio.to_thread(self.store.get, job.id)).asked
        if place is None or wish == "cancel":
            await self._record(job.id, jobs.stopped)
            return
        await self._register(job, model, place)

    async def _trained(self, job: Job) -> Path | None:
        """A trainer's result, or None where it was stopped; no trainer is left however this ends.

        Raises what it failed with.
        """
        training = await asyncio.to_thread(Training, self.store.place(job.id))
        self._tokens = 0.0
        following = asyncio.ensure_future(asyncio.to_thread(self._follow, training))
        try:
            while not following.done():
                await asyncio.wait([following], timeout=LOOK_S)
                if self._ending.is_set():
                    training.stop(CLOSING_S)
                elif (await asyncio.to_thread(self.store.get, job.id)).asked in ("pause", "cancel"):
                    training.stop()
        finally:
            training.stop()
            await asyncio.wait([following])
            following.exception()  # looked at, also where another error goes out
        return following.result()

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

    async def _register(self, job: Job, model: Path, place: Path) -> None:
        """Let a result be a version of its adapter, and serve if it is better. Raises LichenError.

        What it learned from is noted before it serves, so that none that is to be forgotten is overlooked.
        """
        learned = await asyncio.to_thread(self._learned_from, job)
        enter_all = functools.partial(enter, base_name=job.model, lessons=learned)
        version, half = await asyncio.to_thread(enter_all, self.registry, job.name, place, model)
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)  # the registry has it
        tainted: frozenset[str] = frozenset()
        if self._journal is not None:
            digests = [one.digest for one in (version, half) if one is not None]
            await self._journal.do(lambda journal: journal.used_in(learned, *digests))
            tainted = frozenset(one.adapter for one in await self._journal.do(lambda j: j.tainted()))
        kept: Judged | None = None
        if version.digest in tainted:
            await asyncio.to_thread(self.registry.taint, tainted)
            if half is not None:
                await asyncio.to_thread(self.registry.remove, half.name, half.digest)
        else:
            about = (version, model, self.store.place(job.id), self._limits, half)
            kept = await asyncio.to_thread(let_decide, self.registry, *about)
        outcome = Outcome(
            adapter=job.name,
            digest=version.digest if kept is None else kept.name,
            tokens=round(self._tokens),
            checkpoint="end" if kept is None else kept.checkpoint,
        )
        await self._record(job.id, functools.partial(jobs.ended, status="succeeded", outcome=outcome))

    def _learned_from(self, job: Job) -> list[str]:
        """Ids of the files or of the journal's records."""
        records = self.store.place(job.id) / jobs.RECORDS
        if job.lessons and records.exists():
            return msgspec.json.decode(records.read_bytes(), type=list[str])
        return [id for id in (job.training, job.validation) if id]

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


class TrainerDied(TrainingError):
    """The trainer's process ended without a word: killed, or out of memory."""


def event_ends(event: Event) -> bool:
    """Whether a trainer says with it how it ended."""
    from lichen.adapters.events import Failed, Finished, Stopped

    return isinstance(event, Failed | Finished | Stopped)


def _in_words(error: Exception) -> LichenError:
    """What a job failed with, as a sentence for its owner."""
    if isinstance(error, LichenError):
        return error
    if isinstance(error, OSError):
        return TrainingError(
            f"The system refused what the training needs: {error.strerror or error}.",
            hint="Is there room on the disk? Then make the job again.",
        )
    return TrainingError(f"An unexpected error ended the job: {type(error).__name__}: {error}.")
