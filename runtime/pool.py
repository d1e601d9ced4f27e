"""The models of one process: loaded when they are asked for, unloaded when nobody asks any more.

    async with pool.use("name") as model:
        ...  # the model stays meanwhile

Who asks for a model that is being loaded shares that load; when the last of them leaves, it is given up.
Native loads and unloads happen one after the other, so that what is free and what each model took can be
told apart. A load that does not fit first evicts idle models, the longest idle first; then it takes fewer
slots or a shorter context; then it waits for busy models, and after `wait` seconds it is refused. Pinned
models stay. Everything here runs on one event loop; only the shelf's methods and `close` of a model block,
in threads. `residency.py` is the lower half, which moves models in and out of memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lichen.errors import LichenError, NotFound, OutOfMemory, Unavailable
from lichen.runtime.residency import PoolOptions, Residency, candidate_of, happens, now
from lichen.runtime.resident import Candidate, LoadProgress, ModelStatus, Resident

if TYPE_CHECKING:
    from lichen.runtime.served_model import ServedModel

__all__ = ["DEFAULT", "ModelPool", "PoolOptions"]

DEFAULT = "default"
REPORT_S = 0.1  # between two reports of a load's progress
ENDING = " (ending)"  # behind the name of a model whose successor has taken over


class ModelPool(Residency):
    """See the module. Made of a shelf and `PoolOptions`; on the event loop that it is used on."""

    # ---- using models -----------------------------------------------------------------------------

    @asynccontextmanager
    async def use(
        self, name: str | None = None, keep_alive: float | None = None
    ) -> AsyncIterator[ServedModel]:
        """The model, loaded first if need be, and not unloaded inside. None: the default one.

        keep_alive: seconds that it stays after this use (-1: for ever, None: as before).
        Raises NotFound, OutOfMemory, Unavailable, and what loading raises.
        """
        resident = await self._acquire(name or DEFAULT)
        try:
            assert resident.model is not None, "a ready model is there"
            yield resident.model
        finally:
            self._leave(resident, keep_alive)

    async def load(
        self,
        name: str | None = None,
        *,
        pin: bool | None = None,
        keep_alive: float | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> ModelStatus:
        """Load a model, unless it is there. pin: whether it must stay (None: as it is).

        progress: told how far the load is, 0 to 1. Raises as `use` does.
        """
        acquiring = asyncio.ensure_future(self._acquire(name or DEFAULT))
        try:
            while not acquiring.done():
                await asyncio.wait({acquiring}, timeout=REPORT_S if progress else None)
                if progress is not None and (resident := self._names.get(name or DEFAULT)) is not None:
                    progress(resident.progress.done)
        except asyncio.CancelledError:
            acquiring.cancel()
            with suppress(asyncio.CancelledError, LichenError):
                self._leave(await acquiring, keep_alive)  # it may have come just now
            raise
        resident = acquiring.result()
        resident.pinned = resident.pinned if pin is None else pin
        self._leave(resident, keep_alive)
        return resident.status(now())

    async def unload(self, name: str | None = None) -> int:
        """Unload a model once it is idle, pinned or not; the bytes that came free.

        Raises NotFound for one that is not loaded, Unavailable when it is busy for too long.
        """
        resident = self._present(name)
        deadline = now() + self.options.wait
        while True:
            changed = self._changed
            async with self._gate:
                if resident.state == "ready" and not resident.users:
                    return await self._evict(resident, "as asked")
            if resident.gone.is_set():
                return 0
            if not await happens(changed, deadline):
                raise Unavailable(
                    f"{resident.candidate.name} is still answering.", hint="Unload it in a moment."
                )

    async def renew(self, name: str | None = None) -> bool:
        """Let a name, if it is loaded, mean what the shelf has under it now; whether it means another model.

        The new model is loaded beside the old one, then the name moves, and the old one goes once it has
        answered: no request is dropped or waits. Where both do not fit, the old one goes first, and the
        next request waits for the new one. Raises what the shelf and loading raise; the name then stays.
        """
        name = name or DEFAULT
        old = self._names.get(name)
        if old is not None and old.state == "loading":
            with suppress(LichenError):
                await asyncio.shield(old.loaded)
        if old is None or old.state != "ready":
            return False
        found = await asyncio.to_thread(self.shelf.find, name)
        if old.candidate.name == found.name:
            return False
        try:
            new = await self._acquire(found.name)
        except OutOfMemory:
            new = None
        for alias in [alias for alias, there in self._names.items() if there is old]:
            meant = await asyncio.to_thread(self._meant, alias)
            if meant == found.name and new is not None:
                self._names[alias] = new
            elif meant != old.candidate.name:
                self._names.pop(alias, None)
        if new is not None:
            new.pinned, new.keep_alive = old.pinned, old.keep_alive
            self._leave(new)
        old.pinned, old.keep_alive = False, 0.0
        if not old.users and old.state == "ready":
            old.stop_timer()
            self._let_expire(old)
        return True

    def _meant(self, alias: str) -> str:
        """The model that the shelf has under a name, "" for none. Blocks."""
        try:
            return self.shelf.find(alias).name
        except LichenError:
            return ""

    async def swap(self, name: str | None = None, *, patient: bool = False) -> None:
        """Load a model again as the shelf has it now, beside itself, and let that take over.

        What runs ends on the old one, which then goes; no request waits or is lost. patient: where both do
        not fit, let the old one end first, while new requests wait.

        Raises OutOfMemory where both do not fit (the old one stays then), NotFound, and Unavailable while
        it is loading or an earlier swap is not over.
        """
        old = self._present(name)
        candidate = await asyncio.to_thread(self.shelf.find, name or DEFAULT)
        if old.state != "ready" or old.candidate.name + ENDING in self._residents:
            raise Unavailable(f"{old.candidate.name} is being loaded or swapped.", hint="Try again later.")
        new = Resident(candidate, old.pinned, asyncio.get_running_loop().create_future())
        new.keep_alive = old.keep_alive
        async with self._gate:
            self._settle()
            fitted = await asyncio.to_thread(self.shelf.fit, candidate, None)
            if beside := fitted.estimate.total <= self._free():
                model = await self._load(new, fitted)
            elif not patient:
                raise OutOfMemory(f"{candidate.name} beside itself", fitted.estimate.total, self._free())
            if self._closing or old.state != "ready":
                if beside:
                    await self._discard(model)
                raise Unavailable(f"{candidate.name} was unloaded while it was swapped.")
            self._replace(old, new)
            if beside:
                self._ready(new, model)
        if not beside:
            await old.gone.wait()
            self._begin_load(new, lambda: self._bring(new))
            await asyncio.shield(new.loaded)

    def pin(self, name: str | None = None, pinned: bool = True) -> None:
        """Keep a loaded model, or let it go again. Raises NotFound."""
        resident = self._present(name)
        resident.pinned = pinned
        resident.stop_timer()
        if not resident.users and resident.state == "ready":
            self._let_expire(resident)

    def loaded(self) -> list[ModelStatus]:
        """The models that are here or on their way."""
        moment = now()
        return [resident.status(moment) for resident in self._residents.values()]

    def ready(self) -> list[ServedModel]:
        """The models that answer now; each may be unloaded at any time."""
        return [
            resident.model
            for resident in self._residents.values()
            if resident.model is not None and not resident.ending
        ]

    async def known(self) -> list[Candidate]:
        """Every model that could be loaded, the default one first."""
        return await asyncio.to_thread(self.shelf.known)

    def served(self, name: str | None = None) -> ServedModel | None:
        """A model that is ready now, or None; it may be unloaded at any time."""
        resident = self._names.get(name or DEFAULT)
        return resident.model if resident is not None else None

    def start(self, loading: Awaitable[ServedModel], progress: LoadProgress) -> asyncio.Future[None]:
        """Take over the default model while something else loads it; done when it is ready."""
        resident = self._enter(Candidate(name=DEFAULT, path=Path()), {DEFAULT}, pinned=True)
        resident.progress = progress
        self._begin_load(resident, lambda: self._take_over(resident, loading))
        return resident.loaded

    def adopt(self, model: ServedModel) -> None:
        """Take a loaded model as the pinned default one."""
        resident = self._enter(candidate_of(model), {DEFAULT}, pinned=True)
        self._ready(resident, model)

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, give up loads, let running answers finish; True when all did in time."""
        self._closing = True
        self._give_up_loads()
        engines = [resident.model.engine for resident in self._residents.values() if resident.model]
        return all(await asyncio.gather(*(asyncio.to_thread(engine.drain, timeout) for engine in engines)))

    async def close(self) -> None:
        """End everything and give all memory back; idempotent."""
        self._closing = True
        self._give_up_loads()
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        for resident in list(self._residents.values()):
            if resident.state == "ready":
                await self._evict(resident, "since lichen stops")

    # ---- one model's way in and out ---------------------------------------------------------------

    async def _acquire(self, name: str) -> Resident:
        while True:
            if self._closing:
                raise Unavailable("lichen is shutting down and takes no new requests.")
            resident = self._names.get(name) or await self._begin(name)
            if resident.state == "unloading":
                await resident.gone.wait()
                continue
            self._settle()
            resident.users += 1
            resident.stop_timer()
            if resident.state == "loading":
                try:
                    await asyncio.shield(resident.loaded)
                except BaseException:
                    self._leave(resident)
                    raise
            return resident

    async def _begin(self, name: str) -> Resident:
        """The resident of a name that is not known yet, perhaps one that is here under another name."""
        candidate = await asyncio.to_thread(self.shelf.find, name)
        resident = self._residents.get(candidate.name)
        if resident is not None:
            self._names[name] = resident
            return resident
        if self._closing:
            raise Unavailable("lichen is shutting down and takes no new requests.")
        resident = self._enter(candidate, {name, candidate.name}, pinned=name == DEFAULT)
        self._begin_load(resident, lambda: self._bring(resident))
        return resident

    def _enter(self, candidate: Candidate, names: set[str], *, pinned: bool) -> Resident:
        resident = Resident(candidate, pinned, asyncio.get_running_loop().create_future())
        self._residents[candidate.name] = resident
        self._names |= dict.fromkeys({*names, candidate.name}, resident)
        return resident

    def _leave(self, resident: Resident, keep_alive: float | None = None) -> None:
        self._settle()
        resident.users -= 1
        if keep_alive is not None:
            resident.keep_alive = keep_alive
        if resident.users:
            return
        if resident.state == "loading" and not resident.pinned:
            self._give_up(resident)
        elif resident.state == "ready":
            resident.idle_since = now()
            self._let_expire(resident)
            self._tell()

    def _let_expire(self, resident: Resident) -> None:
        """Start the clock of an idle model."""
        keep = self.options.keep_alive if resident.keep_alive is None else resident.keep_alive
        if resident.model is not None and resident.model.engine.state == "failed":
            keep = 0.0  # the next request loads it anew
        if resident.pinned or keep < 0 or self._closing:
            return
        resident.expires_at = now() + keep
        resident.timer = asyncio.get_running_loop().call_later(
            keep, lambda: self._spawn(self._expire(resident))
        )

    async def _expire(self, resident: Resident) -> None:
        async with self._gate:
            due = resident.expires_at is not None and resident.expires_at <= now() + 0.01
            if due and resident.state == "ready" and not resident.users:
                await self._evict(resident, "since nobody used it")

    def _replace(self, old: Resident, new: Resident) -> None:
        """Give the names of one resident to another; the old one goes when nobody uses it."""
        name = old.candidate.name
        old.candidate = msgspec.structs.replace(old.candidate, name=name + ENDING)
        self._residents |= {old.candidate.name: old, new.candidate.name: new}
        self._names = {known: new if there is old else there for known, there in self._names.items()}
        old.ending, old.pinned, old.keep_alive = True, False, 0.0
        old.stop_timer()
        if not old.users:
            self._let_expire(old)

    def _give_up(self, resident: Resident) -> None:
        resident.state = "unloading"
        resident.progress.wanted = False
        if resident.task is not None:
            resident.task.cancel()

    def _give_up_loads(self) -> None:
        for resident in list(self._residents.values()):
            if resident.state == "loading":
                self._give_up(resident)

    def _present(self, name: str | None) -> Resident:
        resident = self._names.get(name or DEFAULT)
        if resident is None:
            raise NotFound(f"The model {name or DEFAULT!r} is not loaded.", param="model")
        return resident
