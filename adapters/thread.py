"""The journal on a thread of its own, for a program with an event loop.

Requests wait in one queue. The thread takes all that are there, runs them in one transaction, each within a
savepoint of its own, and answers them after the commit: many share one fsync, none is answered before it is
durable, and they run in the order in which they came. The file is opened with the first request.

A damaged file is put aside and a new one begun; a file that somebody moved away is noticed before the
answers go out, and the work is done again in the new one. Whatever fails, fails for whoever waits: the event
loop never waits for the disk, and memory is bounded by MAX_WAITING and MAX_BYTES.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lichen.errors import JournalBusy, JournalDamaged, JournalError, JournalFull

if TYPE_CHECKING:
    from lichen.adapters.journal import Journal

log = logging.getLogger("lichen.journal")

MAX_WAITING = 10_000  # requests
MAX_BYTES = 64 << 20  # of answers that wait to be kept
MAX_BATCH = 256  # requests that share a commit
ATTEMPTS = 3  # for a batch whose file was damaged, moved away or full

T = TypeVar("T")
Work = Callable[["Journal"], T]


@dataclass(slots=True)
class _Job:
    """One request. told: gets its result or error, on the loop; scrub: it deleted something."""

    work: Callable[[Journal], Any]
    told: Callable[[Any, BaseException | None], None]
    loop: asyncio.AbstractEventLoop
    size: int
    scrub: bool


@dataclass(slots=True)
class _Outcome:
    value: Any = None
    error: BaseException | None = None


class JournalThread:
    """Makes no file and no thread before the first request. close: waits for what was asked before."""

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path = path
        self._limit = limit
        self._journal: Journal | None = None
        self._thread: threading.Thread | None = None
        self._jobs: deque[_Job] = deque()
        self._bytes = 0
        self._closing = False
        self._awake = threading.Condition()

    def size_on_disk(self) -> int:
        """Bytes of the file and its log of changes; 0 where there is none. Blocks for a moment."""
        sizes = 0
        for end in ("", "-wal"):
            with suppress(OSError):
                sizes += self.path.with_name(self.path.name + end).stat().st_size
        return sizes

    async def do(self, work: Work[T], *, size: int = 0, scrub: bool = False) -> T:
        """Run `work` inside a transaction; durable when this returns. size: bytes that it holds meanwhile.

        scrub: it deletes, and this returns when no byte of that is left in the files. Raises what `work`
        raises, and JournalError and its kinds.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def told(value: Any, error: BaseException | None) -> None:
            if future.done():  # who asked is gone
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        self._put(_Job(work, told, loop, size, scrub))
        return await future

    def post(self, work: Work[Any], *, size: int, told: Callable[[Any, BaseException | None], None]) -> None:
        """Have `work` run without waiting for it; `told` hears on the loop how it went.

        What is asked later finds it done. Raises JournalBusy when too much waits.
        """
        self._put(_Job(work, told, asyncio.get_running_loop(), size, scrub=False))

    async def close(self) -> None:
        """Finish what was asked and close the file; then nothing more is taken."""
        with self._awake:
            self._closing = True
            self._awake.notify()
            thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join)

    def _put(self, job: _Job) -> None:
        with self._awake:
            if self._closing or len(self._jobs) >= MAX_WAITING or self._bytes + job.size > MAX_BYTES:
                raise JournalBusy("The journal takes nothing more for now.", hint="Try again in a moment.")
            self._jobs.append(job)
            self._bytes += job.size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lichen-journal", daemon=True)
                self._thread.start()
            self._awake.notify()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                outcomes = self._process(batch)
            except BaseException as error:  # a defect of ours must not leave anybody waiting
                log.exception("The journal failed.")
                outcomes = [_Outcome(error=error) for _ in batch]
                self._drop()
            for job, outcome in zip(batch, outcomes, strict=True):
                _tell(job, outcome)
        self._drop()

    def _next_batch(self) -> list[_Job]:
        """What waits, at most MAX_BATCH; empty at the end."""
        with self._awake:
            while not self._jobs and not self._closing:
                self._awake.wait()
            batch = [self._jobs.popleft() for _ in range(min(MAX_BATCH, len(self._jobs)))]
            self._bytes -= sum(job.size for job in batch)
            return batch

    def _process(self, batch: Sequence[_Job]) -> list[_Outcome]:
        """Outcomes in the order of the batch; what has a value is durable."""
        failure: JournalError = JournalError("The journal changed its place again and again.")
        for _ in range(ATTEMPTS):
            try:
                journal = self._open()
                outcomes = _commit(journal, batch)
                if journal.in_place():
                    return self._scrubbed(journal, batch, outcomes)
                self._drop()
                continue
            except JournalDamaged as error:
                failure = error
                self._put_aside(error)
            except JournalFull as error:
                failure = error
                if self._journal is None or not self._journal.make_room():
                    break
            except JournalError as error:
                failure = error
                break
        self._drop()
        if len(batch) > 1:  # one that is too large must not fail the others
            return [outcome for job in batch for outcome in self._process([job])]
        return [_Outcome(error=failure)]

    def _scrubbed(self, journal: Journal, batch: Sequence[_Job], outcomes: list[_Outcome]) -> list[_Outcome]:
        """Once for all deletions of a batch."""
        deleted = [i for i, job in enumerate(batch) if job.scrub and outcomes[i].error is None]
        if deleted:
            try:
                journal.scrub()
            except JournalError as error:
                for i in deleted:
                    outcomes[i] = _Outcome(error=error)
        return outcomes

    def _open(self) -> Journal:
        from lichen.adapters.journal import Journal

        if self._journal is not None and not self._journal.in_place():
            self._drop()
        if self._journal is None:
            self._journal = Journal.open(self.path, limit=self._limit)
        return self._journal

    def _put_aside(self, error: JournalDamaged) -> None:
        from lichen.adapters.sqlite_errors import put_aside

        self._drop()
        aside = put_aside(self.path)
        if aside is not None:
            log.error("%s It was kept as %s, and a new journal was begun.", error, aside.name)

    def _drop(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            try:
                journal.close()
            except JournalError as error:
                log.warning("%s", error)


def _commit(journal: Journal, batch: Sequence[_Job]) -> list[_Outcome]:
    """Run a batch in one transaction. Raises JournalError when none of it was kept."""
    outcomes = []
    with journal.writing():
        for job in batch:
            try:
                with journal.step():
                    outcomes.append(_Outcome(job.work(journal)))
            except (JournalFull, JournalDamaged, JournalBusy):
                raise  # of the file, not of this request
            except Exception as error:
                if not journal.in_transaction:  # the disk failed and took the whole batch with it
                    raise
                outcomes.append(_Outcome(error=error))
    return outcomes


def _tell(job: _Job, outcome: _Outcome) -> None:
    with suppress(RuntimeError):  # its loop has ended
        job.loop.call_soon_threadsafe(job.told, outcome.value, outcome.error)
