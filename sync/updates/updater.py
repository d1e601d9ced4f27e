"""Carries updates through their states, one process at a time, and can be killed anywhere.

Every step is done first and noted second, and doing it again is harmless: what a killed process leaves is
brought in order by `recovery.py` when the next one begins. Whatever happens, a slot serves its old version
or its new one (slots.py). A step that hangs is cut at the time-out of its state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from lichen.errors import (
    AdapterError,
    DiskFull,
    FleetError,
    LichenError,
    ManifestError,
    ModelFileError,
    NotFound,
    OutOfMemory,
    StoreError,
    Unavailable,
)
from lichen.sync.manifest import KINDS
from lichen.sync.meter import Progress
from lichen.sync.pace import Pace
from lichen.sync.store import Store
from lichen.sync.updates import staging
from lichen.sync.updates.health import DEFAULT_HEALTH, Health, Measured, Trial, measured, verdict
from lichen.sync.updates.ledger import Ledger
from lichen.sync.updates.recovery import recover
from lichen.sync.updates.slots import Slot, Slots, Version
from lichen.sync.updates.states import Assignment, Cause, State, Update, advanced, deadline
from lichen.sync.updates.supply import Offer, Supply

POLL_S = 0.25  # between two looks at whether a running step has to end
PERMIT_S = 10.0  # between two looks at whether a download may go on
TRIALS = 2  # a version in whose trial the process died so often is bad

log = logging.getLogger("lichen.fleet")
Result = TypeVar("Result")
Permit = Callable[[Update], str]
Watch = Callable[[Update], None]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an assignment. update: None where nothing had to be done or could be begun.

    waiting: for what it waits, such as power. error: why it could not go on now. Either is a sentence.
    """

    assignment: Assignment
    update: Update | None = None
    waiting: str = ""
    error: str = ""


class _Ended(Exception):
    """A step was cut, since its update has to end."""

    def __init__(self, cause: Cause, reason: str) -> None:
        self.cause, self.reason = cause, reason


class _Paused(Exception):
    """A step was cut, since the rules of this machine hold it back by now."""


class Updater:
    """The updates of one machine. folder: for the record of updates. trial: None accepts without one.

    clock: seconds since 1970. permit: why an update has to wait in its state, "" if it may go on.
    on_change: told of each state as it is entered. Close it after use.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        supply: Supply,
        trial: Trial | None,
        *,
        clock: Callable[[], float] = time.time,
        permit: Permit = lambda _update: "",
        on_change: Watch = lambda _update: None,
    ) -> None:
        self._folder, self._store, self._supply, self._trial = folder, store, supply, trial
        self._clock, self._permit, self._on_change = clock, permit, on_change
        self.slots = Slots(store.root)
        self.ledger = Ledger(folder / "updates.db")

    def close(self) -> None:
        """Close the record; idempotent."""
        self.ledger.close()

    async def pull(
        self, wanted: Sequence[Assignment], *, progress: Progress | None = None, pace: Pace | None = None
    ) -> list[Outcome]:
        """Bring each slot to what it should have, models first, as far as may be now.

        Raises FleetError where another process does it, and StoreError where the record cannot be kept;
        what goes wrong with one assignment is in its outcome.
        """
        async with self._locked():
            await self._recover()
            outcomes = []
            for assignment in sorted(wanted, key=_order):
                try:
                    outcomes.append(await self._have(assignment, progress, pace))
                except (FleetError, NotFound, StoreError, ModelFileError) as error:
                    outcomes.append(Outcome(assignment=assignment, error=str(error)))
            await asyncio.to_thread(self._tidy)
            return outcomes

    async def drop(self, slot: str) -> None:
        """Take a slot out of use and end its update. Raises FleetError where another process is at it."""
        async with self._locked():
            await self._recover()
            update = self.ledger.latest().get(slot)
            if update is not None and not update.ended:
                self._end(update, "superseded", "The fleet took it back.")
            self.slots.drop(slot)
            await asyncio.to_thread(self._tidy)

    async def call_off(self, slot: str, reason: str) -> None:
        """End the update of a slot that is not wanted any more, if one is under way; what is in use stays.

        Raises FleetError where another process is at it.
        """
        async with self._locked():
            await self._recover()
            update = self.ledger.latest().get(slot)
            if update is not None and not update.ended:
                self._end(update, "cancelled", reason)
            await asyncio.to_thread(self._tidy)

    async def cancel(self, slot: str) -> Update:
        """End the update of a slot; one on trial goes back to the old version. Raises FleetError.

        A process that is at it is asked to, and waited for.
        """
        update = self.ledger.latest().get(slot)
        if update is None or update.ended:
            raise FleetError(f"No update of {slot} is under way.", hint="See: lichen fleet state")
        self.ledger.ask_to_cancel(update.id)
        while not (update := self.ledger.get(update.id)).ended:
            with suppress(FleetError):
                async with self._locked():
                    await self._recover()
            await asyncio.sleep(POLL_S)
        return update

    async def _recover(self) -> None:
        await asyncio.to_thread(recover, self._store, self.slots, self.ledger, self._clock())
        for update in self.ledger.latest().values():
            ending = None if update.ended else self._ending(update)
            if ending is not None:
                self._end(update, ending.cause, ending.reason)

    async def _have(self, assignment: Assignment, progress: Progress | None, pace: Pace | None) -> Outcome:
        offer = await self._supply.find(assignment.target)
        staging.check_assignment(assignment, offer)
        slot = self.slots.mendable().get(assignment.slot, Slot())
        update = self.ledger.latest().get(assignment.slot)
        if update is not None and not update.ended and update.sha256 != offer.sha256:
            update = self._end(update, "superseded", f"{assignment.target} came instead.")
            slot = self.slots.mendable().get(assignment.slot, Slot())
        if offer.sha256 in slot.bad:
            return Outcome(
                assignment=assignment,
                error=f"{assignment.target} failed on this machine before and is not tried again.",
            )
        if update is None or update.ended:
            if slot.active is not None and slot.active.sha256 == offer.sha256:
                return Outcome(assignment=assignment)
            staging.check_base(self._store, self.slots, offer.manifest)
            update = self._begin(assignment, offer, slot)
        return await self._carry(assignment, update, progress, pace)

    def _begin(self, assignment: Assignment, offer: Offer, slot: Slot) -> Update:
        now = self._clock()
        update = self.ledger.add(
            Update(
                id=0,
                slot=assignment.slot,
                target=assignment.target,
                sha256=offer.sha256,
                size=offer.manifest.size,
                manifest=offer.manifest,
                state="offered",
                begun=now,
                entered=now,
                before=slot.active.sha256 if slot.active is not None else "",
                rollout=assignment.rollout,
                health=assignment.health,
            )
        )
        self._on_change(update)
        return update

    async def _carry(
        self, assignment: Assignment, update: Update, progress: Progress | None, pace: Pace | None
    ) -> Outcome:
        """State after state, until it ends, has to wait, or cannot go on now."""

        async def bring(update: Update) -> Update:
            offer = Offer(target=update.target, sha256=update.sha256, manifest=update.manifest)
            await self._supply.bring(offer, progress=progress, pace=pace)
            return self._enter(update, "downloaded")

        async def begin(update: Update) -> Update:
            return self._enter(update, "downloading")

        steps: dict[str, Callable[[Update], Awaitable[Update]]] = {
            "offered": begin,
            "downloading": bring,
            "downloaded": self._stage,
            "staged": self._activate,
            "active": self._try,
        }
        while not update.ended:
            if waiting := self._permit(update):
                return Outcome(assignment=assignment, update=update, waiting=waiting)
            try:
                update = await self._watched(update, steps[update.state](update))
            except _Paused as paused:
                return Outcome(assignment=assignment, update=update, waiting=str(paused))
            except _Ended as ended:
                update = self._end(self.ledger.get(update.id), ended.cause, ended.reason)
            except LichenError as error:
                if update.state == "downloading" and not isinstance(error, NotFound | ManifestError):
                    # the next pull goes on, until the state times out
                    return Outcome(assignment=assignment, update=update, error=str(error))
                update = self._fail(update, error)
        return Outcome(assignment=assignment, update=update)

    def _fail(self, update: Update, error: LichenError) -> Update:
        """End an update whose step went wrong."""
        if isinstance(error, ModelFileError | AdapterError):  # it will never be better
            self.slots.condemn(update.slot, update.sha256)
        refused = isinstance(error, ManifestError | ModelFileError | AdapterError)
        return self._end(update, "refused" if refused else "failed", str(error))

    async def _stage(self, update: Update) -> Update:
        """Hash the whole file once more and look into it. Raises LichenError."""
        await asyncio.to_thread(staging.check_blob, self._store, update)
        staging.check_base(self._store, self.slots, update.manifest)
        await asyncio.to_thread(staging.check_fit, self._store, update)
        return self._enter(update, "staged")

    async def _activate(self, update: Update) -> Update:
        """The switch: one replacement of one file."""
        version = Version(target=update.target, sha256=update.sha256, manifest=update.manifest)
        self.slots.switch(update.slot, version)
        return self._enter(update, "active")

    async def _try(self, update: Update) -> Update:
        """The health prompt; it decides between the two last states."""
        if update.trials >= TRIALS:
            return self._end(update, "unhealthy", "lichen died in its trial, twice.")
        update = self.ledger.save(msgspec.structs.replace(update, trials=update.trials + 1))
        if self._trial is not None and staging.tried(update.manifest):
            health = update.health or update.manifest.health or DEFAULT_HEALTH
            try:
                found, why = await asyncio.wait_for(self._measure(update, health), health.seconds)
            except (OutOfMemory, Unavailable, DiskFull) as error:
                return self._end(update, "failed", str(error))
            except LichenError as error:
                return self._end(update, "unhealthy", f"It does not run: {error}")
            except TimeoutError:
                return self._end(update, "unhealthy", f"Its trial took more than {health.seconds:g} s.")
            update = msgspec.structs.replace(update, measured=found)
            if why:
                return self._end(update, "unhealthy", why)
        self.slots.confirm(update.slot)
        return self._enter(update, "confirmed")

    async def _measure(self, update: Update, health: Health) -> tuple[Measured, str]:
        """What the new version shows, and why it fails its bar, which the old one may set."""
        trial = self._trial
        assert trial is not None, "the caller looked"
        slot = self.slots.load()[update.slot]
        before = None
        if health.rate_share and slot.previous is not None and health.prompts:
            old = staging.installed(self._store, update.slot, slot.previous)
            with suppress(LichenError):  # an old version that fails sets no bar
                before = measured(health, await trial.answers(old, health.prompts), None).rate
        assert slot.active is not None, "it was switched to"
        new = staging.installed(self._store, update.slot, slot.active)
        answers = await trial.answers(new, health.prompts) if health.prompts else []
        scored = health.perplexity is not None and health.text
        perplexity = await trial.perplexity(new, health.text) if scored else None
        found = msgspec.structs.replace(measured(health, answers, perplexity), rate_before=before)
        return found, verdict(health, found)

    def _enter(self, update: Update, state: State) -> Update:
        entered = self.ledger.save(advanced(update, state, self._clock()))
        self._on_change(entered)
        return entered

    def _end(self, update: Update, cause: Cause, reason: str) -> Update:
        """Roll back: what serves first, the record second."""
        active = self.slots.mendable().get(update.slot, Slot()).active
        if active is not None and active.sha256 == update.sha256:
            self.slots.go_back(update.slot, bad=cause == "unhealthy")
        ended = advanced(update, "rolled_back", self._clock(), cause=cause, reason=reason)
        log.warning("The update of %s was rolled back (%s): %s", update.slot, cause, reason)
        self.ledger.save(ended)
        self._on_change(ended)
        return ended

    def _ending(self, update: Update) -> _Ended | None:
        """Why an update has to end now."""
        if self.ledger.get(update.id).cancel:
            return _Ended("cancelled", "Somebody cancelled it.")
        if self._clock() >= deadline(update):
            return _Ended("timed_out", f"It stayed {update.state} for too long.")
        return None

    async def _watched(self, update: Update, step: Awaitable[Result]) -> Result:
        """The step, cut when its update has to end or to wait. Raises those, and what the step raises."""
        task = asyncio.ensure_future(step)
        look_again = time.monotonic() + PERMIT_S
        try:
            ending = self._ending(update)
            while ending is None:
                await asyncio.wait({task}, timeout=POLL_S)
                if task.done():
                    return task.result()
                if update.state == "downloading" and time.monotonic() >= look_again:
                    if waiting := self._permit(update):
                        raise _Paused(waiting)
                    look_again = time.monotonic() + PERMIT_S
                ending = self._ending(update)
            raise ending
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, LichenError):
                await task

    def _tidy(self) -> None:
        """Remove the bytes of versions that nothing names any more."""
        held = self.slots.held()
        going: set[str] = set()
        for update in self.ledger.all():
            (going.add if update.ended else held.add)(update.sha256)
        self._store.discard(going - held)

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """One process at a time. Raises FleetError while another has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._folder / "updates.lock", thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise FleetError(
                "Another process updates this machine.", hint="See how far it is: lichen fleet state"
            ) from error
        try:
            yield
        finally:
            lock.release()


def _order(assignment: Assignment) -> tuple[int, str]:
    kind = assignment.slot.partition("/")[0]
    return (KINDS.index(kind) if kind in KINDS else len(KINDS)), assignment.slot
