"""How far a fetch is, in bytes and bytes a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

WINDOW = 3.0  # seconds over which the rate is taken
EVERY = 0.1  # seconds between two reports

FetchPhase = Literal["planning", "local", "fetching", "hashing", "done"]


class FetchProgress(msgspec.Struct, frozen=True):
    """done of total: bytes of the file that are verified (in "hashing": hashed). fetched: bytes from mirrors.

    rate: bytes a second from mirrors, lately.
    """

    phase: FetchPhase
    done: int
    total: int
    fetched: int
    rate: float


Progress = Callable[[FetchProgress], None]


class Meter:
    """Counts what comes and reports it: at most ten times a second, but every phase and each end."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self.fetched = 0
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._last: tuple[str, float] = ("", 0.0)

    def count(self, received: int) -> None:
        """Bytes came from a mirror."""
        self.fetched += received
        now = time.monotonic()
        if now - self._marks[-1][0] >= EVERY:
            self._marks.append((now, self.fetched))
            while now - self._marks[0][0] > WINDOW and len(self._marks) > 2:
                self._marks.popleft()

    def report(self, phase: FetchPhase, done: int) -> None:
        """Tell how far it is; `done` in bytes."""
        now = time.monotonic()
        if self._progress is None:
            return
        if phase == self._last[0] and done != self._total and now - self._last[1] < EVERY:
            return
        self._last = (phase, now)
        since, had = self._marks[0]
        rate = (self.fetched - had) / max(now - since, 1e-3)
        self._progress(FetchProgress(phase, done, self._total, self.fetched, rate))
