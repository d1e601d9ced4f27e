"""Keeps long beginnings of prompts warm over eviction, unloading and restarts: slots to disk and back.

Owned by the engine thread, which calls everything here between two steps. A slot is copied out of the
context on that thread, at memory speed; checksums and files are the work of two side threads, one that
reads and one that writes. A prompt that the disk knows better than the slots waits until its bytes are
there, while the others go on.

Written are slots with many tokens that the disk does not know: when they are about to be overwritten,
when the engine has had nothing to do for a moment, and when it closes. The whole slot is written, answer
included, since a slot cannot be cut without losing what follows; a prompt matches as far as it agrees.
Cells that were computed with another number of threads or in other batches are equal up to rounding, as
they are between slots of one engine. What was computed with an adapter has entries of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from lichen.runtime.adaptation import Adaptation
from lichen.runtime.native import Context
from lichen.runtime.sequence import Sequence as LiveSequence
from lichen.runtime.slots import Placement, SlotPool
from lichen.runtime.spill import SpillStore, SpillStores

MIN_RESTORE = 256  # tokens: computing these takes longer than reading them
MIN_SPILL = 512  # tokens that the disk does not know yet
IDLE_S = 0.25  # without work, before slots are written: requests in a row are not disturbed
MAX_WRITES = 2  # copies of slots in memory that wait for the disk
CLOSE_S = 5.0  # spent on writing when the engine closes


@dataclass(slots=True, eq=False)
class _Read:
    """The one entry that is being read, and for whom. length: tokens of the prompt that it serves."""

    sequence: LiveSequence
    store: SpillStore
    entry: int
    length: int
    data: bytearray | None = None
    done: bool = False

    def arrive(self, data: bytearray | None) -> None:
        self.data, self.done = data, True


class Warmth:
    """Fills slots for prompts and keeps what they held. call: runs a function on the engine thread.

    Without stores it fills slots from other slots only.
    """

    def __init__(
        self,
        context: Context,
        slots: SlotPool,
        stores: SpillStores | None,
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        self.restored_tokens = 0
        self.spilled_tokens = 0
        self._context = context
        self._slots = slots
        self._stores = stores
        self._call = call
        self._read: _Read | None = None
        self._changed: dict[int, None] = {}  # idle slots that may hold something new, oldest first
        self._room = threading.Semaphore(MAX_WRITES)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lichen-spill-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="lichen-spill-write")

    @property
    def patience(self) -> float | None:
        """Seconds without work after which `idle` wants to be called; None for never."""
        return IDLE_S if self._changed else None

    def waits(self, sequence: LiveSequence) -> bool:
        """Whether a sequence should wait for the disk; starts to read for it when nothing else is read.

        One entry is in memory at a time. The engine is called when it is there.
        """
        read = self._read
        if read is not None and read.sequence is sequence:
            # Cells may not be put into a slot while copies between slots are under way.
            return not read.done or (read.data is not None and self._context.copying)
        store = self._store(sequence.adaptation)
        found = self._find(sequence, store)
        if found is None or store is None:
            return False
        if read is None:
            self._read = _Read(sequence, store, entry=found[1], length=found[0])
            self._reader.submit(self._fetch, self._read)
        return True

    def fill(self, sequence: LiveSequence, placement: Placement) -> int:
        """Put the longest known beginning of a prompt into its slot; returns its length in tokens."""
        slot, reused = placement.slot, placement.reused
        self._changed.pop(slot, None)
        read = self._take(sequence)
        from_disk = read is not None and read.data is not None and read.length >= reused + MIN_RESTORE
        kept = 0 if from_disk or placement.copy_from is not None else reused
        if len(placement.held) - kept >= MIN_SPILL:
            self._spill(slot, placement.held, placement.held_with)
        if read is not None and from_disk and not self._context.copying:
            reused = self._restore(read, slot)
        elif placement.copy_from is not None:
            self._context.copy(placement.copy_from, slot)
        if not self._context.truncate(slot, reused):  # memory of recurrent models cannot be cut
            self._context.clear(slot)
            reused = 0
        self._slots.update(slot, sequence.prompt[:reused])
        return reused

    def forget(self, sequence: LiveSequence) -> None:
        """A sequence is gone: what is read for it is not needed."""
        self._take(sequence)

    def released(self, slot: int) -> None:
        """A slot is idle now and keeps its tokens."""
        if self._stores is not None and len(self._slots.tokens(slot)) >= MIN_SPILL:
            self._changed[slot] = None

    def idle(self) -> None:
        """The engine has had nothing to do for a while: write one slot."""
        if self._changed:
            slot = next(iter(self._changed))
            if self._spill(slot, self._slots.tokens(slot), self._slots.adaptation(slot)):
                del self._changed[slot]

    def close(self, *, spill: bool) -> None:
        """Finish what is being written, then write all slots, longest first, for at most CLOSE_S.

        spill: False when the context cannot be trusted any more. Blocks.
        """
        deadline = time.monotonic() + CLOSE_S
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self._read = None
        if not spill or self._stores is None:
            return
        tokens = sorted(
            ((self._slots.tokens(slot), slot) for slot in range(self._slots.count)),
            key=lambda held: len(held[0]),
            reverse=True,
        )
        for held, slot in tokens:
            store = self._store(self._slots.adaptation(slot))
            if store is not None and time.monotonic() < deadline and self._worth_writing(store, held):
                self._write(store, held, self._copy_out(slot, held))

    def _store(self, adaptation: Adaptation) -> SpillStore | None:
        return None if self._stores is None else self._stores.of(adaptation)

    def _find(self, sequence: LiveSequence, store: SpillStore | None) -> tuple[int, int] | None:
        """What the disk holds of a prompt, if that is much more than any slot does."""
        prompt = sequence.prompt
        if store is None or len(prompt) <= MIN_RESTORE:
            return None
        found = store.match(prompt)
        if found is None:
            return None
        length = min(found[0], len(prompt) - 1)  # the last token is computed: its logits are needed
        held = self._slots.longest(prompt, sequence.adaptation)
        return (length, found[1]) if length - held >= MIN_RESTORE else None

    def _fetch(self, read: _Read) -> None:
        """On the reading thread."""
        data = None
        try:
            data = read.store.read(read.entry)
        finally:
            self._call(partial(read.arrive, data))

    def _take(self, sequence: LiveSequence) -> _Read | None:
        read = self._read
        if read is None or read.sequence is not sequence:
            return None
        self._read = None
        return read

    def _restore(self, read: _Read, slot: int) -> int:
        """Put what was read into a slot; the tokens of the prompt that are there then."""
        assert read.data is not None, "something was read"
        held = len(read.store.tokens(read.entry))
        if self._context.restore(slot, read.data) and held in (0, self._context.cells(slot)):
            self.restored_tokens += read.length
            return read.length
        self._context.clear(slot)
        read.store.discard(read.entry)
        return 0

    def _worth_writing(self, store: SpillStore, tokens: Sequence[int]) -> bool:
        if len(tokens) < MIN_SPILL:
            return False
        found = store.match(tokens)
        return found is None or len(tokens) - found[0] >= MIN_SPILL

    def _spill(self, slot: int, tokens: Sequence[int], adaptation: Adaptation) -> bool:
        """Copy a slot and have it written; False when the disk is behind, and nothing was done."""
        store = self._store(adaptation)
        if store is None or not self._worth_writing(store, tokens):
            return True
        if not self._room.acquire(blocking=False):
            return False
        self._writer.submit(self._write_queued, store, tokens, self._copy_out(slot, tokens))
        return True

    def _copy_out(self, slot: int, tokens: Sequence[int]) -> bytearray:
        """The cells of a slot; empty unless they are exactly those of `tokens`."""
        if self._context.copying or self._context.cells(slot) != len(tokens):
            return bytearray()
        try:
            return self._context.save(slot)
        except MemoryError:
            return bytearray()

    def _write_queued(self, store: SpillStore, tokens: Sequence[int], data: bytearray) -> None:
        """On the writing thread."""
        try:
            self._write(store, tokens, data)
        finally:
            self._room.release()

    def _write(self, store: SpillStore, tokens: Sequence[int], data: bytearray) -> None:
        if data and store.write(tokens, data):
            self.spilled_tokens += len(tokens)
