"""Keeps a daemon on the best plan for its intent: makes the layout that the plan wants, looks whether what
happens is what was predicted, and changes over when another plan has become better.

A layout is made by a process of the lowest priority while the file that was asked for is served. It takes
over between two requests: what runs ends on the old model, what comes begins on the new one. Threads and
chunks change between two steps of the running model; slots and layouts by the same take-over. Where two
forms do not fit in memory, a layout waits for the next start; when memory itself is short, new requests
wait until the old form has ended. Every change is logged with its reason, and shown by `/status`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec

from lichen.devices.cost import predict
from lichen.devices.drift import Hysteresis, Window, slowdown, stricter
from lichen.devices.intent import Objectives
from lichen.devices.load import Load
from lichen.devices.pace import Plan
from lichen.devices.plan import choose, cost, pacemaker
from lichen.devices.verdict import Candidate, broken
from lichen.errors import ConfigError, LichenError, OutOfMemory
from lichen.planning import Planned, plan_for, with_plan
from lichen.runtime import memory
from lichen.runtime.layouts import LayoutProgress, LayoutRecord, make
from lichen.runtime.planned import Figures, PlanStatus, retune
from lichen.runtime.pool import ModelPool
from lichen.runtime.watching import Watch
from lichen.shelf import Layout, StoreShelf

log = logging.getLogger("lichen.plan")

WINDOW_S = 10.0
REMEMBERED_S = 600.0  # for how long a plan is made for as many users as there were
PRESSED = 0.85  # of what the plan takes: how much memory is aimed at when none is left
_LIVE = ("threads", "chunk")  # what changes without loading anything

Say = Callable[[str], None]


class Replanning:
    """The plan of one daemon's default model."""

    def __init__(
        self,
        planned: Planned,
        shelf: StoreShelf,
        say: Say,
        *,
        window_s: float = WINDOW_S,
        hysteresis: Hysteresis | None = None,
        available: Callable[[], int] | None = None,
    ) -> None:
        limit = planned.config.memory_limit
        self.planned = planned
        self.plan: Plan = planned.now.plan
        self._shelf = shelf
        self._say = say
        self._window_s = window_s
        self._hysteresis = hysteresis or Hysteresis()
        self._crowds: deque[tuple[float, int]] = deque()  # moments, and users that were there
        self._available = available or (lambda: memory.available(limit))
        self._status = PlanStatus(
            intent=", ".join(planned.wish.intents),
            layout=self.plan.layout,
            slots=self.plan.slots,
            threads=self.plan.threads,
            chunk=self.plan.chunk,
            predicted=_figures(planned.now),
        )
        self._shelf.replan(planned.config, Layout(planned.path, planned.sha256))

    async def keep(self, pool: ModelPool, first: Awaitable[None]) -> None:
        """As long as the daemon runs. first: done when its model is loaded."""
        try:
            await first
        except LichenError:
            return  # the daemon tells it
        self._tell(pool)
        await asyncio.gather(self.bring_layout(pool), self._watch(pool))

    # ---- layouts ----------------------------------------------------------------------------------

    async def bring_layout(self, pool: ModelPool) -> bool:
        """Make what is wanted, and swap it in; whether that was done. Errors are logged: serving goes on."""
        layout, asked = self.planned.wanted, self.planned.asked
        if layout is None:
            return False
        self._say(f"The layout {layout} is being made, since it is the best for this plan.")

        def made(now: LayoutProgress) -> None:
            log.info("Making the layout %s: %s, %.0f %%", layout, now.stage, 100 * now.done)
            self._tell(pool, making=f"{layout}: {now.stage} {now.done:.0%}")

        try:
            record = await make(asked.path, asked.sha256, layout, self.planned.config.home, progress=made)
            if not self._keeps_quality(record):
                return False
            return await self._take_up_layout(pool)
        except LichenError as error:
            log.warning("The layout %s is not used: %s", layout, error)
            return False
        finally:
            self._tell(pool, making="")

    def _keeps_quality(self, record: LayoutRecord) -> bool:
        least = self.planned.wish.objectives.quality
        kept = math.exp(-record.kl)
        if kept < least:
            log.warning(
                "The layout %s keeps %.4f of the predictions (mean KL %.2g), not %.4f, and is not used.",
                *(record.layout, kept, record.kl, least),
            )
        return kept >= least

    async def _take_up_layout(self, pool: ModelPool) -> bool:
        """Plan again with the layout that is here now. Raises LichenError."""
        before = self.planned
        layouts = [one.layout for one in before.fingerprints]
        planned = await asyncio.to_thread(
            lambda: plan_for(before.base, before.asked, before.wish, given=before.given, layouts=layouts)
        )
        try:
            await self._swap(pool, planned, patient=False)
        except OutOfMemory:
            self._say("The layout is made; both do not fit in memory, so the next start uses it.")
            return False
        self._changed(pool, f"the layout {planned.now.plan.layout} is made")
        return True

    # ---- watching and changing --------------------------------------------------------------------

    async def _watch(self, pool: ModelPool) -> None:
        watch = Watch(pool)
        while True:
            window = await watch.window(self._window_s)
            if window is not None:
                await self.consider(pool, window, asyncio.get_running_loop().time())

    async def consider(self, pool: ModelPool, window: Window, now: float) -> None:
        """What a window means for the plan; changes over where that is worth it. Errors are logged."""
        load = window.load()
        if load is None:
            return
        present = self._present(load)
        slow = slowdown(present.prediction, window)
        seen = Figures(ttft=window.ttft, rate=window.rate, memory=memory.resident())
        self._tell(pool, seen=seen, predicted=_figures(present), slowdown=slow)
        held = self._available() + present.prediction.memory
        limit = held if self._available() else round(PRESSED * present.prediction.memory)
        objectives = stricter(self.planned.wish.objectives, slow, limit)
        intents = self.planned.wish.intents
        load = self._expected(load, now)
        present = self._present(load)
        try:
            better, objectives = self._better(load, objectives)
        except ConfigError as error:
            log.info("The plan stays: %s", error)
            return
        fastest = pacemaker((present, better), intents[0])
        costs = [cost(one.prediction, intents[0], fastest) for one in (present, better)]
        kept = not broken(present, objectives)
        if self._hysteresis.ready(better.plan, costs[0] if kept else math.inf, costs[1], now):
            why = _why(load, slow, limit if limit < held else None)
            await self._change(pool, better, why, now)

    def _expected(self, load: Load, now: float) -> Load:
        """The same for as many users as the wish names, or as there were lately: who has just left comes
        back, and finds no slot where the plan was made for those who stayed."""
        self._crowds.append((now, load.users))
        while self._crowds[0][0] < now - REMEMBERED_S:
            self._crowds.popleft()
        users = max(self.planned.wish.load.users, *(count for _, count in self._crowds))
        return msgspec.structs.replace(load, users=users)

    def _better(self, load: Load, objectives: Objectives) -> tuple[Candidate, Objectives]:
        """The best plan within the objectives; where no plan keeps their times, the best within the others.

        With the objectives that counted: a daemon that cannot keep its times under a load still does what it
        can. Raises ConfigError.
        """
        planned = self.planned

        def pick(limits: Objectives) -> Candidate:
            intents, space = planned.wish.intents, planned.space
            return choose(planned.here, load, intents=intents, objectives=limits, space=space).pick

        try:
            return pick(objectives), objectives
        except ConfigError:
            rest = msgspec.structs.replace(objectives, ttft=None, itl=None, rate=None)
            return pick(rest), rest

    def _present(self, load: Load) -> Candidate:
        """The plan that is followed, under another load."""
        fingerprint = next(one for one in self.planned.here if one.layout == self.plan.layout)
        space = self.planned.space
        found = predict(fingerprint, self.plan, load, kl=space.kl(self.plan) or 0.0, memory=space.memory)
        return Candidate(self.plan, found)

    async def _change(self, pool: ModelPool, better: Candidate, why: str, now: float) -> None:
        differing = {
            name for name in Plan.__struct_fields__ if getattr(self.plan, name) != getattr(better.plan, name)
        }
        try:
            if differing <= set(_LIVE) and (served := pool.served()) is not None:
                retune(served, threads=better.plan.threads, chunk=better.plan.chunk)
                self.planned = with_plan(self.planned, better)
                self._shelf.replan(self.planned.config, Layout(self.planned.path, self.planned.sha256))
            else:
                await self._swap(pool, with_plan(self.planned, better), patient=not self._available())
        except LichenError as error:
            log.warning("The plan could not be changed: %s", error)
        else:
            self._changed(pool, why)
        self._hysteresis.changed(now)

    async def _swap(self, pool: ModelPool, planned: Planned, *, patient: bool) -> None:
        """Let the pool change over; on an error all stays as it was. Raises LichenError."""
        before = self.planned
        self._shelf.replan(planned.config, Layout(planned.path, planned.sha256))
        try:
            await pool.swap(patient=patient)
        except LichenError:
            self._shelf.replan(before.config, Layout(before.path, before.sha256))
            raise
        self.planned = planned

    def _changed(self, pool: ModelPool, why: str) -> None:
        self.plan = plan = self.planned.now.plan
        self._say(
            f"Plan changed, since {why}: layout {plan.layout}, {plan.slots} slots, {plan.threads} threads, "
            f"chunks of {plan.chunk}."
        )
        self._tell(
            pool,
            layout=plan.layout,
            slots=plan.slots,
            threads=plan.threads,
            chunk=plan.chunk,
            predicted=_figures(self.planned.now),
            changes=self._status.changes + 1,
            reason=why,
        )

    def _tell(self, pool: ModelPool, **now: object) -> None:
        self._status = msgspec.structs.replace(self._status, **now)
        pool.plan = self._status


def _figures(one: Candidate) -> Figures:
    found = one.prediction
    return Figures(ttft=found.ttft, rate=found.rate, memory=found.memory)


def _why(load: Load, slow: float, memory_left: int | None) -> str:
    """The reason of a change, for people."""
    why = (
        f"{load.users} are answered at once, prompts have {load.prompt:,} tokens and answers {load.answer:,}"
    )
    if slow > 1.3:
        why += f", the machine is {slow:.1f} times slower than it was"
    if memory_left is not None:
        why += f", and memory is short ({memory_left / 1e6:,.0f} MB are aimed at)"
    return why
