"""Keeps a daemon on the best plan for its intent: makes the layout that the plan wants, and swaps it in.

The layout is made by a process of the lowest priority while the file that was asked for is served. It takes
over between two requests: what runs ends on the old model, what comes begins on the new one. Where both do
not fit in memory, the layout is used from the next start on. Every step is logged with its reason.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

from lichen.errors import LichenError, OutOfMemory
from lichen.planning import Planned, plan_for
from lichen.runtime.layouts import LayoutProgress, LayoutRecord, make
from lichen.runtime.pool import ModelPool
from lichen.shelf import Layout, StoreShelf

log = logging.getLogger("lichen.plan")

Say = Callable[[str], None]


class Replanning:
    """The plan of one daemon's default model."""

    def __init__(self, planned: Planned, shelf: StoreShelf, say: Say) -> None:
        self.planned = planned
        self.making: LayoutProgress | None = None
        self._shelf = shelf
        self._say = say
        self._shelf.replan(planned.config, Layout(planned.path, planned.sha256))

    async def keep(self, pool: ModelPool, first: Awaitable[None]) -> None:
        """As long as the daemon runs. first: done when its model is loaded."""
        try:
            await first
        except LichenError:
            return  # the daemon tells it
        await self.bring_layout(pool)

    async def bring_layout(self, pool: ModelPool) -> bool:
        """Make what is wanted, and swap it in; whether that was done. Errors are logged: serving goes on."""
        layout, asked = self.planned.wanted, self.planned.asked
        if layout is None:
            return False
        self._say(f"The layout {layout} is being made, since it is the best for this plan.")
        try:
            record = await make(
                asked.path, asked.sha256, layout, self.planned.config.home, progress=self._made
            )
            if not self._keeps_quality(record):
                return False
            await self._swap(pool, f"the layout {layout} is ready")
        except LichenError as error:
            log.warning("The layout %s is not used: %s", layout, error)
            return False
        finally:
            self.making = None
        return True

    def _made(self, now: LayoutProgress) -> None:
        self.making = now
        log.info("Making the layout %s: %s, %.0f %%", self.planned.wanted, now.stage, 100 * now.done)

    def _keeps_quality(self, record: LayoutRecord) -> bool:
        least = self.planned.wish.objectives.quality
        kept = math.exp(-record.kl)
        if kept >= least:
            return True
        log.warning(
            "The layout %s keeps %.4f of the predictions (mean KL %.2g), less than %.4f, and is not used.",
            *(record.layout, kept, record.kl, least),
        )
        return False

    async def _swap(self, pool: ModelPool, why: str) -> None:
        """Plan again with what is here now, and let the pool change over. Raises LichenError."""
        before, planned = self.planned, self._again()
        self._shelf.replan(planned.config, Layout(planned.path, planned.sha256))
        try:
            await pool.swap()
        except OutOfMemory:
            self._shelf.replan(before.config, Layout(before.path, before.sha256))
            self._say("The layout is made; both do not fit in memory, so the next start uses it.")
            return
        except LichenError:
            self._shelf.replan(before.config, Layout(before.path, before.sha256))
            raise
        self.planned = planned
        self._say(f"Changed over to the layout {planned.choice.pick.plan.layout}: {why}.")

    def _again(self) -> Planned:
        """The plan from what was measured already."""
        before = self.planned
        return plan_for(
            before.config,
            before.asked,
            before.wish,
            given=before.given,
            layouts=[one.layout for one in before.fingerprints],
        )
