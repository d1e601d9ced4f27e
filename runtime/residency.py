"""How models come into memory and leave it, one after the other, and what has to go for another.

The lower half of the pool (`pool.py` is the upper one, which knows requests and clocks). Invariants: the
gate is held while memory is taken or given back; a model that is used is never evicted; nothing is
evicted for a load that would not fit anyway; a load that is given up is waited for and closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lichen.errors import EngineError, LichenError, OutOfMemory, Unavailable
from lichen.runtime import heap, memory
from lichen.runtime.resident import Candidate, Ledger, Resident, Shelf

if TYPE_CHECKING:
    from lichen.runtime.memory import Fitted
    from lichen.runtime.planned import PlanStatus
    from lichen.runtime.served_model import ServedModel

log = logging.getLogger("lichen.pool")


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """keep_alive: seconds that an idle model stays (-1: for ever). memory_limit: bytes for this process
    (0: 80 % of the machine's). max_models: loaded at once (0: any number). wait: seconds for busy ones."""

    keep_alive: float = 300.0
    memory_limit: int = 0
    max_models: int = 0
    wait: float = 30.0


class Residency:
    """See the module. available: bytes that may still be taken; resident: bytes that this process has."""

    def __init__(
        self,
        shelf: Shelf,
        options: PoolOptions | None = None,
        *,
        available: Callable[[], int] | None = None,
        resident: Callable[[], int] = memory.resident,
    ) -> None:
        import numpy  # noqa: F401 - drawing needs it: loaded before the count begins, it is no model's memory

        heap.one_heap()
        self.shelf = shelf
        self.options = options or PoolOptions()
        limit = self.options.memory_limit
        self._available = available or (lambda: memory.available(limit))
        self._residents: dict[str, Resident] = {}
        self._names: dict[str, Resident] = {}  # every name that a present model was asked for by
        self._ledger = Ledger(resident)
        self._gate = asyncio.Lock()  # held while memory is taken or given back
        self._loading: Resident | None = None
        self._changed = asyncio.Event()  # replaced at each change that a waiting load may like
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self.plan: PlanStatus | None = None  # of the default model, where it has one
        self.on_ready: Callable[[str], None] = lambda _name: None
        self.on_evicted: Callable[[str], None] = lambda _name: None

    def _begin_load(self, resident: Resident, bring: Callable[[], Awaitable[ServedModel]]) -> None:
        def given_up(task: asyncio.Task[Any]) -> None:
            if task.cancelled():  # perhaps before its first step
                error = Unavailable("The load was given up, since lichen stops or nobody waited for it.")
                self._drop(resident, error)

        resident.task = self._spawn(self._run(resident, bring))
        resident.task.add_done_callback(given_up)

    async def _run(self, resident: Resident, bring: Callable[[], Awaitable[ServedModel]]) -> None:
        """One load, from its start to `ready` or to the error that all who wait get."""
        try:
            model = await bring()
        except LichenError as error:
            self._drop(resident, error)
        except Exception as error:
            log.exception("Loading %s failed.", resident.candidate.name)
            self._drop(resident, EngineError(f"The model cannot be loaded ({type(error).__name__})."))
        else:
            self._ready(resident, model)

    def _ready(self, resident: Resident, model: ServedModel) -> None:
        resident.model, resident.fitted = model, model.fitted
        resident.state, resident.idle_since = "ready", now()
        resident.loaded.set_result(None)
        self.on_ready(resident.candidate.name)
        if not resident.users:
            self._let_expire(resident)
        self._tell()

    def _drop(self, resident: Resident, error: LichenError | None) -> None:
        """Forget a model that is no longer here."""
        resident.state = "unloading"
        resident.stop_timer()
        if self._residents.get(resident.candidate.name) is resident:
            del self._residents[resident.candidate.name]
        self._names = {name: there for name, there in self._names.items() if there is not resident}
        if error is not None and not resident.loaded.done():
            resident.loaded.set_exception(error)
            resident.loaded.exception()  # nobody has to be waiting
        resident.gone.set()
        self._tell()

    # ---- memory -----------------------------------------------------------------------------------

    async def _bring(self, resident: Resident) -> ServedModel:
        """Make room, waiting for busy models if that helps, and load."""
        wanted = await asyncio.to_thread(self.shelf.fit, resident.candidate, None)
        deadline = now() + self.options.wait
        while True:
            changed = self._changed
            async with self._gate:
                fitted = await self._make_room(resident, wanted)
                if fitted is not None:
                    return await self._load(resident, fitted)
            if not await happens(changed, deadline):
                raise Unavailable(
                    f"{resident.candidate.name} needs {wanted.estimate.total / 1e6:,.0f} MB, and the models "
                    f"that hold the memory were answering for {self.options.wait:g} s.",
                    hint="Try again in a moment.",
                )

    async def _make_room(self, resident: Resident, wanted: Fitted) -> Fitted | None:
        """How the model can be loaded now; None if busy models have to end first. Raises OutOfMemory."""
        candidate = resident.candidate
        self._settle()
        others = [other for other in self._residents.values() if other.state == "ready"]
        movable = [other for other in others if not other.pinned]
        limit = self.options.max_models
        if limit and len(others) - len(movable) >= limit:
            raise Unavailable(
                f"{candidate.name} cannot be loaded beside {limit} pinned models.",
                hint="Unload one, or raise --max-models.",
            )
        # Before anything is evicted: would it fit if all that may go were gone?
        await asyncio.to_thread(self.shelf.fit, candidate, self._free() + sum(m.held for m in movable))
        while self._crowded() or wanted.estimate.total > self._free():
            idle = [other for other in movable if other.state == "ready" and not other.users]
            if not idle:
                break
            oldest = min(idle, key=lambda other: other.idle_since)
            await self._evict(oldest, f"to make room for {candidate.name}")
        busy = any(other.users for other in movable)
        if self._crowded():
            return None
        try:
            return await asyncio.to_thread(self.shelf.fit, candidate, self._free())
        except OutOfMemory:
            if busy:
                return None
            raise

    def _crowded(self) -> bool:
        limit = self.options.max_models
        ready = sum(resident.state == "ready" for resident in self._residents.values())
        return bool(limit) and ready >= limit

    def _free(self) -> int:
        """Bytes for another model, once those that are here have all that they were promised."""
        return self._available() - sum(resident.untouched for resident in self._residents.values())

    async def _load(self, resident: Resident, fitted: Fitted) -> ServedModel:
        """The native load, in a thread. One that is given up is waited for and closed."""
        load = asyncio.to_thread(self.shelf.load, resident.candidate, fitted, resident.progress)
        return await self._to_its_end(resident, asyncio.ensure_future(load))

    async def _discard(self, model: ServedModel) -> None:
        """Close a model that nobody got."""
        await asyncio.to_thread(_close, model)
        self._ledger.start_over()

    async def _take_over(self, resident: Resident, loading: Awaitable[ServedModel]) -> ServedModel:
        async with self._gate:
            model = await self._to_its_end(resident, asyncio.ensure_future(loading))
            del self._residents[resident.candidate.name]
            resident.candidate = candidate_of(model)
            self._residents[resident.candidate.name] = resident
            self._names |= dict.fromkeys(model.names, resident)
            return model

    async def _to_its_end(self, resident: Resident, load: asyncio.Future[ServedModel]) -> ServedModel:
        self._loading = resident
        try:
            model = await asyncio.shield(load)
        except asyncio.CancelledError:
            resident.progress.wanted = False
            with suppress(Exception):
                await asyncio.to_thread(_close, await load)
            self._ledger.start_over()
            raise
        finally:
            self._settle()
            self._loading = None
        return model

    async def _evict(self, resident: Resident, why: str) -> int:
        """Close an idle model and give its memory back, also if the caller is cancelled meanwhile."""
        resident.state = "unloading"
        resident.stop_timer()
        return await asyncio.shield(self._spawn(self._evict_now(resident, why)))

    async def _evict_now(self, resident: Resident, why: str) -> int:
        self._settle()
        before = self._ledger.start_over()
        model, resident.model = resident.model, None
        if model is not None:
            await asyncio.to_thread(_close, model)
        freed = before - self._ledger.start_over()
        self.on_evicted(resident.candidate.name)
        log.info("%s was unloaded %s: %.0f MB came free.", resident.candidate.name, why, freed / 1e6)
        self._drop(resident, None)
        return freed

    def _settle(self) -> None:
        active = [self._loading] if self._loading else [r for r in self._residents.values() if r.users]
        self._ledger.settle(active)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _let_expire(self, resident: Resident) -> None:
        """Start the clock of an idle model; the pool knows how long."""
        raise NotImplementedError


def _close(model: ServedModel) -> None:
    model.close()
    heap.trim()


def candidate_of(model: ServedModel) -> Candidate:
    info = model.info
    return Candidate(
        name=info.name,
        path=Path(),
        sha256=info.sha256,
        size=info.size,
        architecture=info.architecture,
        capabilities=info.capabilities,
    )


def now() -> float:
    return asyncio.get_running_loop().time()


async def happens(event: asyncio.Event, deadline: float) -> bool:
    """Wait for an event until a moment of the loop's clock; whether it came."""
    try:
        async with asyncio.timeout_at(deadline):
            await event.wait()
    except TimeoutError:
        return False
    return True
