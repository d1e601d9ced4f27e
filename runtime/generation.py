"""An answer on its way: the caller's end of a sequence, as an async iterator of events.

The engine thread posts events to a `Mailbox`; the caller's event loop reads them. The engine never
holds a reference to a `Generation`, so one that is dropped (a `break`, a cancelled task) cancels its
sequence by itself.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from lichen.errors import EngineError
from lichen.runtime.answer import AnswerReader
from lichen.runtime.sequence import Event, Failed, Finished, Piece, Sequence


class Mailbox:
    """Events of one sequence, handed from the engine thread to the loop that the mailbox was made on."""

    __slots__ = ("_alarm", "_events", "_patience", "_waiter", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._patience = math.inf  # until when the reader waits, by the loop's clock
        self._alarm: asyncio.TimerHandle | None = None

    def put(self, events: Iterable[Event]) -> None:
        """Add events and wake the reader; on the loop only."""
        self._events.extend(events)
        if self._waiter is not None:
            _wake(self._waiter)

    async def get(self, seconds: float | None = None) -> Event | None:
        """The next event, or None when none came for so many seconds; one reader at a time."""
        if not self._events:
            waiter = self._waiter = self.loop.create_future()
            self._wait_at_most(seconds)
            try:
                await waiter
            finally:
                self._waiter = None
        return self._events.popleft() if self._events else None

    def _wait_at_most(self, seconds: float | None) -> None:
        """Wake the reader after so long. An alarm that rings too early is set again, so that events
        in quick succession do not set one each."""
        if seconds is None:
            self._patience = math.inf
            return
        self._patience = self.loop.time() + seconds
        if self._alarm is not None and self._alarm.when() > self._patience:
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None:
            self._alarm = self.loop.call_at(self._patience, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is None or self._patience == math.inf:
            return
        if self.loop.time() < self._patience:
            self._alarm = self.loop.call_at(self._patience, self._ring)
        else:
            _wake(self._waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def deliver(sequences: Iterable[Sequence]) -> None:
    """Post a step's events from the engine thread: one wake-up for each loop, however many readers."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, list[Event]]]] = {}
    for sequence in sequences:
        if sequence.events:
            letter = (sequence.mailbox, sequence.events)
            by_loop.setdefault(sequence.mailbox.loop, []).append(letter)
            sequence.events = []
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, group)
        except RuntimeError:  # that loop was closed; its generations cancel themselves when collected
            continue


def _put_all(letters: list[tuple[Mailbox, list[Event]]]) -> None:
    for mailbox, events in letters:
        mailbox.put(events)


class Generation:
    """Async iterator over the events of one sequence; raises the sequence's error.

    `finished` is set after the last event. Dropping it, `aclose()`, or cancelling the task that iterates
    frees the sequence's cells before the engine's next step.
    """

    def __init__(
        self,
        sequence: Sequence,
        mailbox: Mailbox,
        cancel: Callable[[Sequence], None],
        reader: AnswerReader | None = None,
        *,
        keep: object = None,
        life: Callable[[Sequence], None] | None = None,
    ) -> None:
        """keep: whatever must live as long as this does. life: is told when the answer is complete."""
        self.sequence = sequence
        self._keep, self._life = keep, life
        self.reader = reader  # splits a chat answer's text into its parts
        self.finished: Finished | None = None
        self._mailbox = mailbox
        self._cancel = cancel
        self._open = True

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not self._open:
            raise StopAsyncIteration
        while (event := await self.next(None)) is None:
            continue
        return event

    async def next(self, seconds: float | None) -> Event | None:
        """The next event, or None when there was none for so many seconds (None: wait for it)."""
        try:
            event = await self._mailbox.get(seconds)
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(event, Failed):
            self._open = False
            raise event.error
        if isinstance(event, Finished):
            self._open = False
            self.finished = event
            if self._life is not None:
                self._life(self.sequence)
        return event

    async def text(self) -> str:
        """The whole answer, once it is finished."""
        parts = [event.text async for event in self if isinstance(event, Piece)]
        if self.finished is None:
            raise EngineError("The answer was closed before it was complete.")
        return "".join(parts)

    def close(self) -> None:
        """Cancel the sequence if it still runs; idempotent, and safe from any thread."""
        if self._open:
            self._open = False
            self._cancel(self.sequence)

    @property
    def done(self) -> bool:
        """Whether no more events come."""
        return not self._open

    def __del__(self) -> None:
        self.close()
