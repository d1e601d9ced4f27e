"""Who may come in: the engine's state, and how many sequences were admitted and have not ended yet.

Thread-safe: the event loops admit, the engine thread lets go and may close the door.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from lichen.devices.intent import Intent
from lichen.errors import LichenError, QueueFull, Unavailable
from lichen.runtime.counters import Counters
from lichen.runtime.sequence import Sequence

State = Literal["running", "draining", "failed", "closed"]

# Seconds by which a request counts as older than it is: bounded, so that nobody waits for ever.
HEAD_START_S: Mapping[Intent, float] = {"latency": 10.0, "throughput": -10.0, "battery": -10.0}


def line_up(waiting: deque[Sequence], more: Iterable[Sequence]) -> None:
    """Put sequences into the queue, the oldest first after what their intents are given."""
    waiting.extend(more)
    ordered = sorted(waiting, key=lambda s: s.submitted_at - HEAD_START_S.get(s.options.intent, 0.0))
    waiting.clear()
    waiting.extend(ordered)


class Admission:
    """places: sequences that may be in the engine, running or waiting; queue_limit: of them waiting."""

    def __init__(self, places: int, queue_limit: int) -> None:
        self.state: State = "running"
        self.failure: LichenError | None = None
        self.count = 0
        self._places = places
        self._queue_limit = queue_limit
        self._ended = 0
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._started_at = time.perf_counter()

    @property
    def closed(self) -> bool:
        """Whether the end has come."""
        return self.state == "closed"

    def enter(self, count: int, counters: Counters) -> None:
        """Admit `count` sequences, all or none, and count them. Raises QueueFull, Unavailable, or the
        failure of the engine."""
        with self._lock:
            if self.state != "running":
                raise self.failure or Unavailable("lichen is shutting down and takes no new requests.")
            room = self._places - self.count
            if count > room:
                counters.rejected += count
                raise QueueFull(
                    f"{max(0, min(room, self._queue_limit))} of {self._queue_limit} places in the queue are "
                    f"free, and this request needs {count}.",
                    retry_after=self._retry_after(),
                )
            self.count += count
            counters.requests += count
            self._idle.clear()

    def leave(self) -> None:
        """A sequence has ended, one way or another."""
        with self._lock:
            self.count -= 1
            self._ended += 1
            if not self.count:
                self._idle.set()

    def while_alive(self, action: Callable[[], None]) -> None:
        """Do something that must not come after the end. Raises Unavailable, or the engine's failure."""
        with self._lock:
            if self.state in ("failed", "closed"):
                raise self.failure or Unavailable("lichen was closed.")
            action()

    def drain(self) -> None:
        """Take nobody new."""
        with self._lock:
            if self.state == "running":
                self.state = "draining"

    def fail(self, error: LichenError) -> None:
        """The engine is broken; everyone who comes gets this error."""
        with self._lock:
            self.failure = error
            if self.state != "closed":
                self.state = "failed"

    def close(self) -> bool:
        """The end; whether it was not the end before."""
        with self._lock:
            first = self.state != "closed"
            self.state = "closed"
            return first

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nobody is in the engine; whether that came within `timeout` seconds."""
        return self._idle.wait(timeout)

    def _retry_after(self) -> int:
        """Seconds that an answer took on average, from 1 to 60."""
        if not self._ended:
            return 1
        return max(1, min(60, round((time.perf_counter() - self._started_at) / self._ended)))
