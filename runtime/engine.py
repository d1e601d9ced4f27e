"""The engine: one thread that owns the native context and turns live sequences into events.

A turn (`_step`) is: plan, draft, decode, draw, deliver. Other threads only put commands into the inbox;
nothing else ever calls the context, and no lock is held while it decodes. All events of a turn are posted at
its end, with one wake-up for each event loop that reads them.

A failed decode is given to the sequences in that batch. Their slots are emptied and the context is
tried with one token: if it answers the engine goes on, otherwise it is `failed`, and every sequence that
waits or comes later gets that error.

Who may come in is `admission.py`'s to say, what may be drafted `speculation/`'s.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace

import msgspec

from lichen.errors import ContextOverflow, EngineError, LichenError, Unavailable
from lichen.runtime.adapter_bank import AdapterBank
from lichen.runtime.admission import Admission, State, line_up
from lichen.runtime.batch import decode_error, pack, slot_of
from lichen.runtime.counters import Counters
from lichen.runtime.drawing import Drawing
from lichen.runtime.generation import deliver
from lichen.runtime.metrics import EngineObserver
from lichen.runtime.native import DECODE_OK, Context, Model
from lichen.runtime.scheduler import PREFILL_SHARE, Budget, Chunk, Scheduler
from lichen.runtime.sequence import Failed, Finished, FinishReason, Prefill, Sequence
from lichen.runtime.slots import SlotPool
from lichen.runtime.speculation.plan import Speculation
from lichen.runtime.speculation.verify import verify
from lichen.runtime.spill import SpillStores
from lichen.runtime.warmth import Warmth

log = logging.getLogger("lichen.engine")


class Engine:
    """Runs sequences on one context. Thread-safe: `submit`, `cancel`, `counters`, `drain`, `close`."""

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        queue_limit: int,
        spill: SpillStores | None = None,
        speculation: Speculation | None = None,
        share: int = PREFILL_SHARE,
    ) -> None:
        self.model = model
        self.context = context
        self.observer: EngineObserver | None = None
        self.adapters = AdapterBank(model, context)  # of the engine thread
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, Drawing] = {}
        self._closers: list[Callable[[], None]] = []
        self._slots = SlotPool(context.slots)
        self._warmth = Warmth(context, self._slots, spill, self.call)
        self.speculation = speculation or Speculation.off()
        self._stalled = False  # everything that waits, waits for the disk
        self.scheduler = Scheduler(Budget.of(context.batch, share))
        self._counters = Counters(free_slots=context.slots)
        self._admission = Admission(queue_limit + context.slots, queue_limit)
        self._thread = threading.Thread(target=self._run, name="lichen-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """Whether it takes sequences, and if not, why."""
        return self._admission.state

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences, all or none. Raises ContextOverflow, RequestError, QueueFull or Unavailable, else
        every outcome arrives as an event."""
        for sequence in sequences:
            if len(sequence.prompt) >= self.context.context:
                raise ContextOverflow(len(sequence.prompt), self.context.context)
            sequence.options.check(self.model.vocab_size)
        self._admission.enter(len(sequences), self._counters)
        self._inbox.put(lambda: self._enter(sequences))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; its cells are free before the next step. No event follows."""
        self._inbox.put(lambda: self._cancel(sequence))

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the engine thread between two steps; it may touch the context.

        Raises Unavailable once the engine is gone, so that nobody waits for it in vain.
        """
        self._admission.while_alive(lambda: self._inbox.put(function))

    def on_close(self, function: Callable[[], None]) -> None:
        """Run `function` on the engine thread before the context is freed."""
        self._closers.append(function)

    def counters(self) -> Counters:
        """A snapshot of the counters; who was admitted and does not run yet is waiting."""
        now = msgspec.structs.replace(self._counters)
        now.waiting = max(0, self._admission.count - now.running)
        now.restored_tokens, now.spilled_tokens = self._warmth.restored_tokens, self._warmth.spilled_tokens
        now.adapter_switches = self.adapters.switches
        return now

    def drain(self, timeout: float) -> bool:
        """Take no more sequences and wait for those that run, at most `timeout` seconds, then end the
        rest with an error. Blocks; True when all finished by themselves."""
        self._admission.drain()
        finished = self._admission.wait_idle(timeout)
        if not finished:
            error = Unavailable("lichen stopped before this answer was complete.")
            self._inbox.put(lambda: self._fail_all(error))
            self._admission.wait_idle(10)
        return finished

    def close(self) -> None:
        """End every sequence, stop the thread and free the context. Blocks; idempotent."""
        if self._admission.close():
            self._inbox.put(lambda: self._fail_all(Unavailable("lichen was closed.")))
        self._thread.join()

    # Below: the engine thread.

    def _run(self) -> None:
        import numpy  # noqa: F401 - 0.1 s that the first answer need not wait for

        try:
            while not self._admission.closed:
                self._read_inbox()
                self._admit()
                if self._running and not self._admission.closed:
                    self._step()
        except BaseException as error:  # a defect of ours: nobody may wait for ever because of it
            log.exception("The engine stopped on an internal error.")
            self._die(EngineError(f"The engine stopped on an internal error ({type(error).__name__})."))
            while not self._admission.closed:
                self._read_inbox()
                self._fail_all(self._admission.failure)
        finally:
            self._read_inbox(block=False)
            self._fail_all(Unavailable("lichen was closed."))
            for close in self._closers:
                close()
            self.speculation.close()
            self._warmth.close(spill=self._admission.failure is None)
            self.adapters.close()
            self.context.close()

    def _read_inbox(self, *, block: bool = True) -> None:
        """Carry out commands; sleep for one when there is nothing to compute."""
        if self._running and self._inbox.empty():
            return
        nothing = not self._running and (not self._waiting or self._stalled)
        wait = block and nothing and not self._admission.closed
        while True:
            try:
                command = self._inbox.get(wait, self._warmth.patience)
            except queue.Empty:
                if wait:
                    self._warmth.idle()
                return
            command()
            wait = False

    def _enter(self, sequences: tuple[Sequence, ...]) -> None:
        line_up(self._waiting, sequences)
        for sequence in sequences:
            self.adapters.begin(sequence.adaptation)

    def _admit(self) -> None:
        """Give free slots to waiting sequences, oldest first."""
        if not self._waiting:
            self._stalled = False
            return
        if self.state == "failed":
            self._fail_all(self._admission.failure)
        passed: deque[Sequence] = deque()
        while self._waiting and self._slots.free:
            sequence = self._waiting.popleft()
            if sequence.options.deterministic:
                self._start(sequence)
            elif self._slots.worth_waiting(sequence.prompt, self._running, sequence.adaptation):
                passed.append(sequence)  # another sequence computes the same beginning right now
            elif self._warmth.waits(sequence):
                passed.append(sequence)  # its beginning comes from the disk
            else:
                self._start(sequence)
        passed.extend(self._waiting)
        self._waiting = passed
        self._stalled = bool(passed) and not self._running
        self._count_now()

    def _start(self, sequence: Sequence) -> None:
        placement = self._slots.acquire(sequence.prompt, sequence.adaptation)
        assert placement is not None, "admitted without a free slot"
        if sequence.options.deterministic:  # from an empty cache
            placement = replace(placement, reused=0, copy_from=None)
        reused = self._warmth.fill(sequence, placement)
        sequence.slot = placement.slot
        sequence.computed = sequence.cached = reused
        sequence.admitted_at = time.perf_counter()
        self._running[sequence] = Drawing(self.model, sequence)
        self.speculation.begin(sequence)
        self._counters.prompt_tokens += len(sequence.prompt)
        self._counters.cached_tokens += reused

    def _step(self) -> None:
        """One turn: plan, draft, decode, draw, deliver."""
        began, drawn = time.perf_counter(), self._counters.completion_tokens
        chunks = self.scheduler.plan(self._running)
        chunks.sort(key=lambda chunk: slot_of(chunk.sequence))  # llama.cpp joins neighbouring streams
        chunks = self.speculation.extend(chunks)
        switches = self.adapters.switches
        if not self._decode(chunks):
            return
        self._counters.steps += 1
        last = -1  # index of the chunk's last known token in the batch
        for chunk in chunks:
            last += chunk.count
            sequence = chunk.sequence
            sequence.computed += chunk.count
            if chunk.completes:
                self._answer(chunk, last)
            else:
                self._held(sequence)
                sequence.events.append(Prefill(sequence.computed, len(sequence.prompt)))
            last += len(chunk.draft)
        deliver(chunk.sequence for chunk in chunks)
        drawn = self._counters.completion_tokens - drawn
        if switches == self.adapters.switches:  # else its time says nothing about what tokens cost
            self.speculation.stepped(drawn, time.perf_counter() - began)

    def _decode(self, chunks: list[Chunk]) -> bool:
        """Compute the chunks; on failure give the error to their sequences and try to recover."""
        batch = pack(chunks)
        try:
            self.adapters.apply(chunks[0].sequence.adaptation)
            code = self.context.decode(*batch)
            if code == DECODE_OK:
                return True
            error: LichenError = decode_error(code)
        except LichenError as caught:  # of the adapter
            error = caught
        log.error("A step of %d tokens of %d sequences failed: %s", len(batch[0]), len(chunks), error)
        for sequence in [chunk.sequence for chunk in chunks]:
            self._end(sequence, Failed(error), keep=0)
        self._recover()
        return False

    def _recover(self) -> None:
        """See whether the context still works, with one token in a free slot."""
        placement = self._slots.acquire([0])
        assert placement is not None, "sequences just ended, so a slot is free"
        self.context.clear(placement.slot)
        code = self.context.decode([0], [0], [placement.slot], [1])
        self.context.clear(placement.slot)
        self._slots.release(placement.slot, ())
        if code != DECODE_OK:
            self._die(EngineError("The engine failed and could not recover.", hint="Restart lichen."))

    def _die(self, error: LichenError) -> None:
        self._admission.fail(error)
        self._fail_all(error)

    def _answer(self, chunk: Chunk, last: int) -> None:
        """Draw what follows a sequence's tokens, which end at batch entry `last`, and check the draft."""
        sequence, slot = chunk.sequence, slot_of(chunk.sequence)

        def draw(position: int) -> int | None:
            if position:  # the guess before it was right, so it is computed already
                sequence.computed += 1
                sequence.accepted += 1
            self.speculation.read(sequence, self.context, last + position)
            return self._draw(sequence, last + position, chunk.draft[position : position + 1])

        sequence.drafted += len(chunk.draft)
        accepted = verify(chunk.draft, draw)
        if chunk.draft:
            self.speculation.judge(chunk, accepted, self._counters)
            if self.observer is not None:
                self.observer.checked(accepted)
        if accepted < len(chunk.draft) and not self.context.truncate(slot, sequence.computed):
            self._forget_cells(sequence, slot)

    def _forget_cells(self, sequence: Sequence, slot: int) -> None:
        """The context cannot take wrong guesses back: compute the sequence again, and draft no more."""
        log.warning("This model's memory cannot be cut, so speculation is off for it.")
        self.speculation.stop()
        self.context.clear(slot)
        self._slots.update(slot, ())
        sequence.computed = 0

    def _draw(self, sequence: Sequence, index: int, guess: Items[int]) -> int | None:
        """Sample the next token of a sequence whose tokens are all computed, and what follows from it; None
        when the answer has ended. guess: the drafted token in its place, if there is one."""
        drawing = self._running[sequence]
        now = time.perf_counter()
        if not sequence.drawn:
            sequence.first_token_at = now
            self._counters.first_tokens += 1
            self._counters.ttft_s += now - sequence.submitted_at
            self._held(sequence)
            if self.observer is not None:
                self.observer.first_token(now - sequence.submitted_at)
        elif self.observer is not None:
            self.observer.token_gap(now - sequence.last_token_at)
        sequence.last_token_at = now
        try:
            token = drawing.draw(self.context, index)
        except LichenError as error:
            self._end(sequence, Failed(error), keep=sequence.computed)
            return None
        sequence.tokens.append(token)
        self._counters.completion_tokens += 1
        if reason := self._tell(sequence, drawing, token, token in guess):
            self._finish(sequence, reason)
            return None
        return token

    def _tell(self, sequence: Sequence, drawing: Drawing, token: int, drafted: bool) -> FinishReason | None:
        """Give out the text of a drawn token; why the answer ends with it, if it does."""
        if self.model.is_end(token):
            return "stop"
        if piece := drawing.show(token, drafted):
            sequence.events.append(piece)
        if drawing.ended:
            return "stop"
        full = sequence.drawn == sequence.options.max_tokens or len(sequence.tokens) >= self.context.context
        return "length" if full else None

    def _held(self, sequence: Sequence) -> None:
        self._slots.update(slot_of(sequence), sequence.tokens[: sequence.computed])
        self._count_now()

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if piece := self._running[sequence].flush():
            sequence.events.append(piece)
        self._counters.completed += 1
        if self.observer is not None:
            self.observer.finished(reason, time.perf_counter() - sequence.submitted_at)
        self._end(sequence, Finished(reason, sequence.usage(), sequence.timings()), keep=sequence.computed)

    def _end(self, sequence: Sequence, event: Finished | Failed, *, keep: int) -> None:
        """Take a sequence out, leave the first `keep` tokens in its slot, and tell it."""
        if isinstance(event, Failed):
            self._counters.failed += 1
        self._release(sequence, keep)
        sequence.events.append(event)
        if isinstance(event, Failed):
            deliver([sequence])

    def _release(self, sequence: Sequence, keep: int) -> None:
        drawing = self._running.pop(sequence, None)
        if drawing is not None:
            drawing.close()
            slot = slot_of(sequence)
            self.speculation.end(sequence)
            if not keep:
                self.context.clear(slot)
            self._slots.release(slot, sequence.tokens[:keep])
            self._warmth.released(slot)
            sequence.slot = None
        self._warmth.forget(sequence)
        self.adapters.end(sequence.adaptation)
        self._count_now()
        self._admission.leave()

    def _cancel(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._release(sequence, sequence.computed)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
            self._release(sequence, 0)
        else:
            return  # it ended before the cancellation arrived
        self._counters.cancelled += 1

    def _fail_all(self, error: LichenError | None) -> None:
        failed = Failed(error or EngineError("The engine failed."))
        for sequence in [*self._running, *self._waiting]:
            self._end(sequence, failed, keep=0 if self._admission.failure else sequence.computed)
        self._waiting.clear()
        self._count_now()

    def _count_now(self) -> None:
        counters = self._counters
        counters.running = len(self._running)
        counters.free_slots = self._slots.free
        counters.cells_used = self._slots.held_tokens
