"""How fast bytes may come: a token bucket that all connections of a transfer share."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Pace(Protocol):
    """Waits until so many bytes may be taken."""

    async def take(self, count: int) -> None:
        """Wait for `count` bytes."""
        ...


class RateLimit:
    """At most `rate` bytes a second on average, and no burst of more than a second's."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = 0.0  # moment up to which the rate is used up

    async def take(self, count: int) -> None:
        """Wait for `count` bytes; callers are served in the order in which they ask."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + count / self.rate
        await asyncio.sleep(max(0.0, self._free_at - count / self.rate - now))
