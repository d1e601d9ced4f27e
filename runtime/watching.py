"""Looks at the default model's counters now and then, and tells what came between two looks."""

from __future__ import annotations

import asyncio

from lichen.devices.drift import Window
from lichen.runtime.counters import Counters
from lichen.runtime.pool import ModelPool

LOOK_S = 0.25  # between two looks at how many requests are under way


class Watch:
    """Windows over one pool, on its event loop."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool

    async def window(self, seconds: float) -> Window | None:
        """What is counted in the next so many seconds; None where the model was changed meanwhile."""
        before = self._counters()
        looks: list[int] = []
        deadline = asyncio.get_running_loop().time() + seconds
        pause = min(LOOK_S, seconds)
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(pause)
            now = self._counters()
            looks.append(0 if now is None else now.running + now.waiting)
        after = self._counters()
        if before is None or after is None or after.requests < before.requests:
            return None
        return difference(before, after, looks, pause)

    def _counters(self) -> Counters | None:
        served = self._pool.served()
        return None if served is None else served.engine.counters()


def difference(before: Counters, after: Counters, looks: list[int], pause: float) -> Window:
    """What came between two snapshots; looks: requests under way, every `pause` seconds between them."""
    busy = [count for count in looks if count]
    return Window(
        busy=len(busy) * pause,
        active=sum(busy) / len(busy) if busy else 0.0,
        requests=after.requests - before.requests,
        completed=after.completed - before.completed,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        cached_tokens=after.cached_tokens - before.cached_tokens,
        completion_tokens=after.completion_tokens - before.completion_tokens,
        first_tokens=after.first_tokens - before.first_tokens,
        ttft_s=after.ttft_s - before.ttft_s,
    )
