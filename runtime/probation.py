"""The time after a promotion: a version with which a bad turn came goes back by itself.

Now and then the life of each version that serves (`lives.py`, and what people said of it in the journal) is
compared with that of the one before it by `adapters/watch.py`. Loss and acceptance depend on what is asked,
so they are compared only with answers that were given under the same name; people's ratings are compared with
those of the model alone too, under whichever name.

It only ever goes back, and takes a version back once: what a person promotes again stays.
Not covered: a first version that is worse than a model which nobody rated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from lichen.adapters.registry import Registry
from lichen.adapters.thread import JournalThread
from lichen.adapters.versions import BASE, ROLLED_BACK
from lichen.adapters.watch import Bounds, Lived, watch
from lichen.errors import LichenError
from lichen.runtime.lives import Life, Lives

log = logging.getLogger("lichen.learning")

EVERY_S = 10.0
ITSELF = "probation"  # who rolled back, in the note


class Probation:
    """The looks of one daemon. journal: None where nobody rates. auto: whether anything goes back."""

    def __init__(
        self,
        registry: Registry,
        lives: Lives,
        journal: JournalThread | None,
        *,
        auto: bool = True,
        bounds: Bounds | None = None,
    ) -> None:
        self._registry, self._lives, self._journal = registry, lives, journal
        self._auto, self._bounds = auto, bounds or Bounds()

    async def run(self) -> None:
        """Look until cancelled; what was counted until then is written."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(EVERY_S)
        finally:
            await self._each(self._lives.flush)

    async def look(self) -> None:
        """Look at every name once. What goes wrong with one is logged, and looked at again."""
        await self._each(self._look)

    async def _each(self, work: Callable[[str], Awaitable[object]]) -> None:
        for name in await asyncio.to_thread(self._registry.names):
            try:
                await work(name)
            except (LichenError, OSError) as error:
                log.warning("How the adapter %s does cannot be looked at, and is again: %s", name, error)

    async def _look(self, name: str) -> None:
        lives = await self._lives.flush(name)
        if not self._auto:
            return
        pair = await asyncio.to_thread(self._on_probation, name)
        if pair is None:
            return
        active, before = pair
        base = (await asyncio.to_thread(self._registry.standing, name)).base
        then = await self._lived(name, before, lives.get(before, Life()), base)
        now = await self._lived(name, active, lives.get(active, Life()), base)
        turn = watch(then, now, self._bounds)
        if turn.decision == "back":
            await asyncio.to_thread(self._go_back, name, active, before, turn.reasons, then, now)

    def _on_probation(self, name: str) -> tuple[str, str] | None:
        """Digests of the version that serves and of the one before it; None where nothing can go back."""
        active = self._registry.standing(name).active
        if active is None:
            return None
        notes = self._registry.notes(name, active)
        if any(note.kind == ROLLED_BACK and note.values.get("by") == ITSELF for note in notes):
            return None  # somebody wants it all the same
        return active, self._registry.before(name)

    async def _lived(self, name: str, digest: str, life: Life, base: str) -> Lived:
        """A life with what people said of it."""
        if self._journal is None or not self._journal.path.exists():
            return life.lived
        under = None if digest == BASE else name
        up, down = await self._journal.do(lambda journal: journal.ratings(under, digest, model=base))
        return msgspec.structs.replace(life.lived, up=up, down=down)

    def _go_back(
        self, name: str, active: str, before: str, reasons: list[str], then: Lived, now: Lived
    ) -> None:
        facts = {
            "by": ITSELF,
            "to": before,
            "before": msgspec.to_builtins(then),
            "now": msgspec.to_builtins(now),
        }
        reason = " ".join(reasons)
        found = self._registry.rollback(name, reason=reason, of=active, facts=facts)
        place = "the model alone" if found is None else found.digest[:12]
        log.warning("The adapter %s went back by itself from %s to %s. %s", name, active[:12], place, reason)
