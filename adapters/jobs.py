"""Jobs of learning: what was asked for, how far it is, and what came of it. Imports no torch.

Layout: `<folder>/<id>/job.json` is the job, replaced whole at every change and durable before anybody is
told; beside it lies what its trainer reads and writes (`launch.py`). Whoever wants a job to pause, go on or
end writes that into it (`asked`), and whoever runs jobs carries it out, so that a command line needs no
daemon. Writers of any process exclude each other by a lock on the folder; readers need none.
"""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import filelock
import msgspec
from msgspec import Meta

from lichen.adapters.launch import CHECKPOINT, EXAMPLES
from lichen.adapters.lineage import MIDDLE
from lichen.adapters.task import Checkpoint, Objective
from lichen.durable import sync_folder, write_file
from lichen.errors import JournalError, JournalFull, LichenError, NotFound, RequestError

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Wish = Literal["pause", "resume", "cancel"]
ENDED: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
MAX_JOBS = 1000
MAX_ATTEMPTS = 3  # a trainer that dies this often is not started again
LOCKED_S = 30.0
_ID = re.compile(r"ftjob-[0-9a-f]{24}")
JOB, LOCK = "job.json", ".lock"
LESSONS, RECORDS, RESULT = "lessons.jsonl", "records.json", "result"  # beside it; `initiative.py` writes two


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """None lets lichen choose. epochs: passes over the lessons. batch: examples a step. multiplier: of the
    learning rate that lichen would take. beta: of preferences. minutes: about how long to train."""

    epochs: Annotated[int, Meta(ge=1, le=50)] | None = None
    batch: Annotated[int, Meta(ge=1, le=256)] | None = None
    multiplier: Annotated[float, Meta(gt=0, le=100)] | None = None
    beta: Annotated[float, Meta(gt=0, le=2)] | None = None
    minutes: Annotated[float, Meta(gt=0, le=10_000)] | None = None
    rank: Annotated[int, Meta(ge=1, le=256)] | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a job. adapter: name; digest: of the version; tokens: that went through the model.
    checkpoint: which of the training's adapters it is."""

    adapter: str
    digest: str
    tokens: int = 0
    checkpoint: Checkpoint = "end"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job. Times are in seconds since 1970; owner: id of an API key.

    training, validation: ids of uploaded files; lessons: path of a file of this machine instead, or of the
    export of what the owner said. model: name of the base model. name: of the adapter. asked: what its owner
    wants and whoever runs it has not done yet. attempts: trainers that were started and died. memory, disk:
    bytes that its trainer may take, 0 for what is free and usual.
    """

    id: str
    owner: str
    created: float
    model: str
    name: str
    training: str = ""
    validation: str = ""
    lessons: str = ""
    objective: Objective = "supervised"
    hyperparameters: Hyperparameters = Hyperparameters()
    seed: int = 0
    metadata: dict[str, str] = {}
    status: Status = "queued"
    asked: Wish | None = None
    attempts: int = 0
    memory: int = 0
    disk: int = 0
    started: float | None = None
    finished: float | None = None
    error: str = ""
    param: str = ""
    outcome: Outcome | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ENDED


class JobStore:
    """Jobs in one folder. Every method blocks for the disk: call it off the event loop.

    Raises JournalFull and JournalError for what the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, job: Job) -> Job:
        """Take a job in; durable when this returns. Raises JournalFull past MAX_JOBS."""
        with _translated(), self._writing():
            if len(list(self.folder.glob(f"*/{JOB}"))) >= MAX_JOBS:
                raise JournalFull("There are too many jobs.", hint="Remove old ones: lichen jobs remove ID.")
            self.place(job.id).mkdir(mode=0o700, exist_ok=True)
            self._write(job)
            sync_folder(self.folder)
        return job

    def jobs(self, owner: str | None = None) -> list[Job]:
        """Jobs of one key, or (None) all, newest first; one whose file is damaged is left out."""
        found = []
        for path in self.folder.glob(f"ftjob-*/{JOB}"):
            try:
                job = self._read(path)
            except JournalError:
                continue
            if owner in (None, job.owner):
                found.append(job)
        return sorted(found, key=lambda job: (job.created, job.id), reverse=True)

    def get(self, id: str, owner: str | None = None) -> Job:
        """One job. Raises NotFound, also for somebody else's."""
        path = self.folder / id / JOB
        if _ID.fullmatch(id) and path.is_file():
            job = self._read(path)
            if owner in (None, job.owner):
                return job
        raise NotFound(f"There is no job {id[:64]!r}.", hint="`lichen jobs` lists them.", param="id")

    def place(self, id: str) -> Path:
        """The folder of a job, where its trainer works."""
        return self.folder / id

    def change(self, id: str, how: Callable[[Job], Job]) -> Job:
        """Replace a job by what `how` makes of it, without anybody in between; durable when this returns.

        Once it has ended, nothing that it would have been trained on is left in its folder.
        """
        with _translated(), self._writing():
            before = self.get(id)
            job = how(before)
            if job != before:
                self._write(job)
            if job.ended:
                self._tidy(id)
        return job

    def sweep(self) -> None:
        """Delete folders of jobs that were never taken in: whoever made them died before."""
        with _translated(), self._writing():
            for folder in self.folder.glob("ftjob-*"):
                if not (folder / JOB).exists():
                    shutil.rmtree(folder)

    def _tidy(self, id: str) -> None:
        for name in (LESSONS, EXAMPLES, CHECKPOINT, MIDDLE):
            with contextlib.suppress(OSError):
                (self.place(id) / name).unlink(missing_ok=True)
        shutil.rmtree(self.place(id) / RESULT, ignore_errors=True)

    def ask(self, id: str, wish: Wish, owner: str | None = None) -> Job:
        """Want a job to pause, to go on or to end. Raises RequestError where that makes no sense."""
        self.get(id, owner)
        return self.change(id, lambda job: wanted(job, wish))

    def remove(self, id: str, owner: str | None = None) -> None:
        """Forget an ended job and all that lies beside it. Raises RequestError where it has not ended."""
        if not self.get(id, owner).ended:
            raise RequestError(f"The job {id} has not ended.", hint=f"lichen jobs cancel {id}", param="id")
        with _translated(), self._writing():
            shutil.rmtree(self.place(id))
            sync_folder(self.folder)

    def _read(self, path: Path) -> Job:
        try:
            job = msgspec.json.decode(path.read_bytes(), type=Job)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise JournalError(f"The job {path.parent.name} cannot be read: {error}.") from error
        if job.id != path.parent.name:
            raise JournalError(f"{path} is of another job.")
        return job

    def _write(self, job: Job) -> None:
        write_file(self.place(job.id) / JOB, msgspec.json.format(msgspec.json.encode(job)))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.folder / LOCK, timeout=LOCKED_S):
                yield
        except filelock.Timeout:
            raise JournalError("Another process holds the jobs.", hint="Try again.") from None


def new_job_id() -> str:
    """An id as OpenAI's look."""
    return f"ftjob-{secrets.token_hex(12)}"


def wanted(job: Job, wish: Wish) -> Job:
    """The job with a wish. What needs no runner is done at once; raises RequestError for what cannot be."""
    if job.ended:
        raise RequestError(f"The job {job.id} has {job.status} already.", param="id")
    if wish == "pause" and job.status == "paused":
        raise RequestError(f"The job {job.id} is paused already.", param="id")
    if wish == "resume":
        if job.status != "paused" and job.asked != "pause":
            raise RequestError(f"The job {job.id} is not paused.", param="id")
        waiting: Status = "queued" if job.status == "paused" else job.status
        return msgspec.structs.replace(job, status=waiting, asked=None)
    if job.status == "running":
        return msgspec.structs.replace(job, asked=wish)
    if wish == "pause":
        return msgspec.structs.replace(job, status="paused", asked=None)
    return ended(job, "cancelled")


def begun(job: Job) -> Job:
    """A trainer starts for it, unless its owner changed his mind meanwhile."""
    if job.status not in ("queued", "validating_files"):
        return job
    return msgspec.structs.replace(job, status="running", started=job.started or time.time())


def ended(
    job: Job, status: Status, *, error: str = "", param: str = "", outcome: Outcome | None = None
) -> Job:
    """Nothing more will happen to it."""
    return msgspec.structs.replace(
        job, status=status, asked=None, finished=time.time(), error=error, param=param, outcome=outcome
    )


def stopped(job: Job) -> Job:
    """Its trainer kept a checkpoint and ended: as its owner asked, or because the daemon ends."""
    if job.ended:
        return job
    if job.asked == "cancel":
        return ended(job, "cancelled")
    status: Status = "paused" if job.asked == "pause" else "queued"
    return msgspec.structs.replace(job, status=status, asked=None)


def interrupted(job: Job) -> Job:
    """Its trainer or its daemon is gone without a word: it is tried again, but not for ever."""
    if job.ended or job.asked == "cancel":
        return stopped(job)
    if job.attempts + 1 >= MAX_ATTEMPTS:
        return ended(job, "failed", error=f"The trainer died {MAX_ATTEMPTS} times.")
    return msgspec.structs.replace(stopped(job), attempts=job.attempts + 1)


def failed(job: Job, error: LichenError) -> Job:
    """It cannot go on, unless it has ended otherwise, or its owner wanted it to end."""
    if job.ended or job.asked == "cancel":
        return stopped(job)
    return ended(job, "failed", error=str(error), param=error.param or "")


@contextmanager
def _translated() -> Iterator[None]:
    """Raise JournalFull and JournalError for the system's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise JournalFull("There is no room for the job.", hint="Free some disk space.") from error
        raise JournalError(f"The job cannot be kept: {error.strerror or error}.") from error
