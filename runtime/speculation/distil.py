"""Collects what a draft head learns from while the model serves: states and likeliest tokens of answers.

The engine thread only copies rows into a bounded queue; a side thread finds the likeliest tokens and writes
segments (`adapters/states.py`), the oldest of which go when the limit is reached. Whatever is too much (a
full queue, many answers at once, a full disk) is left out, and nobody waits.

Only sequences whose content may be kept are collected (`Sequence.kept`, the journal's switch), and only
steps that read no prompt. Deleting the folder forgets everything.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lichen.adapters.states import Run, likeliest, segment_files, write_segment
from lichen.runtime.adaptation import PLAIN
from lichen.runtime.sequence import Sequence

if TYPE_CHECKING:
    from lichen.runtime.native import Context

log = logging.getLogger("lichen.distil")

WAITING_ROWS = 64  # rows of logits that wait for the side thread: 12 MB for 49,152 tokens
AT_ONCE = 4  # sequences that are collected at a time
SEGMENT = 1024  # tokens
SHORTEST = 8  # tokens of a run in a row; a shorter one teaches nothing


@dataclass(slots=True)
class _Row:
    """After `known` tokens of a sequence: its state [hidden] float16 and logits [vocab] float32."""

    sequence: int
    known: int
    state: Any
    logits: Any


@dataclass(slots=True)
class _End:
    sequence: int
    tokens: list[int]


@dataclass(slots=True)
class _Told:
    """Everything before it is on the disk, or dropped."""

    done: threading.Event = field(default_factory=threading.Event)


_Item: TypeAlias = _Row | _End | _Told


class StateCollector:
    """A reader of states that fills `folder`, with at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self._limit = limit
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._live: set[int] = set()  # of the engine thread
        self.collected = 0  # tokens since the start, those on the disk
        self.dropped = 0  # tokens for which there was no time or no room
        self._rows: dict[int, list[tuple[int, Any, Any, Any]]] = {}  # of the side thread, as the rest is
        self._runs: list[Run] = []
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="lichen-distil", daemon=True)
        self._thread.start()

    # ---- the engine thread ----------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """Collect it, if it may be kept, no adapter answers it, and not too many are being collected."""
        if sequence.kept and sequence.adaptation == PLAIN and len(self._live) < AT_ONCE:
            self._live.add(sequence.id)

    def read(self, sequence: Sequence, context: Context, index: int) -> None:
        """Hand a copy of the rows to the side thread."""
        if sequence.id not in self._live:
            return
        if self._queue.qsize() >= WAITING_ROWS:
            self.dropped += 1
            return
        state = context.state(index).astype("float16")
        self._queue.put(_Row(sequence.id, len(sequence.tokens), state, context.logits(index).copy()))

    def end(self, sequence: Sequence) -> None:
        """Its tokens are known now."""
        if sequence.id in self._live:
            self._live.remove(sequence.id)
            self._queue.put(_End(sequence.id, list(sequence.tokens)))

    def close(self) -> None:
        """Write what is left; idempotent."""
        self._queue.put(None)
        self._thread.join()

    # ---- any other thread -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what has ended up to now. Blocks."""
        told = _Told()
        self._queue.put(told)
        while self._thread.is_alive() and not told.done.wait(0.1):
            continue

    # ---- the side thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._take(item)
            except Exception:  # a defect of ours must not end the collection, nor the answers
                log.exception("An answer was not collected.")
        self._write()

    def _take(self, item: _Item) -> None:
        if isinstance(item, _Row):
            row = (item.known, item.state, *likeliest(item.logits))
            self._rows.setdefault(item.sequence, []).append(row)
        elif isinstance(item, _End):
            self._finish(self._rows.pop(item.sequence, []), item.tokens)
            if sum(len(run) for run in self._runs) >= SEGMENT:
                self._write()
        else:
            self._write()
            item.done.set()

    def _finish(self, rows: list[tuple[int, Any, Any, Any]], tokens: list[int]) -> None:
        """Cut an answer where states are missing."""
        first = 0
        for place in range(1, len(rows) + 1):
            if place == len(rows) or rows[place][0] != rows[place - 1][0] + 1:
                self._add(rows[first:place], tokens)
                first = place

    def _add(self, rows: list[tuple[int, Any, Any, Any]], tokens: list[int]) -> None:
        import numpy as np

        while rows and rows[-1][0] >= len(tokens):  # nothing was drawn from it
            rows = rows[:-1]
        if len(rows) < SHORTEST:
            return
        start = rows[0][0]
        states = np.stack([row[1] for row in rows])
        if not np.isfinite(states).all():  # past float16
            return
        own = np.array(tokens[start - 1 : start + len(rows)], np.int32)
        tops, chances = np.stack([row[2] for row in rows]), np.stack([row[3] for row in rows])
        self._runs.append(Run(own, states, tops, chances))

    def _write(self) -> None:
        """Put what is there into a segment, and delete the oldest beyond the limit."""
        if not self._runs:
            return
        runs, self._runs = self._runs, []
        tokens = sum(len(run) for run in runs)
        try:
            write_segment(self.folder, runs)
            self._shrink()
        except OSError as error:
            self.dropped += tokens
            if not self._failing:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                why = "the disk is full" if full else error.strerror or str(error)
                log.warning("Nothing is collected for the draft head: %s (%s).", why, self.folder)
            self._failing = True
            return
        self._failing = False
        self.collected += tokens

    def _shrink(self) -> None:
        files = [(path, path.stat().st_size) for path in segment_files(self.folder)]
        size = sum(size for _, size in files)
        for path, bytes_of_it in files[:-1]:
            if size <= self._limit:
                return
            path.unlink(missing_ok=True)
            size -= bytes_of_it
