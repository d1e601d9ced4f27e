"""A machine of a fleet at work: what it should have, its updates, and what it tells of them.

    enrolment.json, trusted    trust (device.py)
    updates.db                 the record of updates (sync/updates/ledger.py)
    policies/                  the rollouts as they were last seen
    device.key, reports.db     reports (sync/reporting/)

What it should have: what the fleet's rollouts decide for it, and what was asked for by name on this machine.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from lichen.errors import FleetError, LichenError, ManifestError
from lichen.sync.manifest import KINDS
from lichen.sync.meter import Progress
from lichen.sync.pace import Pace
from lichen.sync.reporting.reporter import Reporter, http_post
from lichen.sync.reporting.wire import UpdateReport
from lichen.sync.rollout import DeviceFacts, Policy, decide
from lichen.sync.store import Store
from lichen.sync.trust.bringing import FleetSupply
from lichen.sync.trust.device import Device
from lichen.sync.trust.fetching import Fetcher, fetcher_for
from lichen.sync.trust.policies import fetch_policy
from lichen.sync.updates.health import Health, Trial
from lichen.sync.updates.slots import Slot, Slots
from lichen.sync.updates.states import Assignment, Update
from lichen.sync.updates.updater import Outcome, Permit, Updater

log = logging.getLogger("lichen.fleet")
WATCH_S = 600.0  # between two looks at the rollouts while updates are under way
LENIENT = Health()  # what the fleet goes back to was good before


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine should have. drop: slots that the fleet took back. reasons: of rollouts, by slot.

    cancel: slots whose update under way goes to a version that their rollout does not want here any more.
    """

    assignments: tuple[Assignment, ...] = ()
    drop: tuple[str, ...] = ()
    cancel: tuple[str, ...] = ()
    reasons: dict[str, str] = {}


class Served(msgspec.Struct, frozen=True):
    """Requests that a version has answered, and those of them that failed."""

    requests: int = 0
    errors: int = 0


NOTHING_SERVED = Served()


class Member:
    """This machine as a working member of its fleet. folder: where all of it lies. Close it after use.

    running: the version of this lichen. urls: mirrors instead of the fleet's own. hardware: class of this
    machine for rollouts. clock: seconds since 1970. Raises FleetError if it is in no fleet.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        store: Store,
        trial: Trial | None,
        *,
        running: str,
        clock: Callable[[], float],
        urls: Sequence[str] = (),
        hardware: str = "",
        permit: Permit = lambda _update: "",
        on_change: Callable[[Update], None] = lambda _update: None,
    ) -> None:
        self._bundle, self._folder = device.enrolment(), folder
        self._device, self._store, self._running = device, store, running
        self._urls, self._hardware, self._clock, self._on_change = tuple(urls), hardware, clock, on_change
        self.reporter = Reporter.at(folder, self._bundle, hardware=hardware)
        supply = FleetSupply(device, store, running=running, urls=urls)
        self.updater = Updater(
            folder, store, supply, trial, clock=clock, permit=permit, on_change=self._changed
        )

    def close(self) -> None:
        """Close its files; idempotent."""
        self.updater.close()
        self.reporter.close()

    async def pull(
        self, targets: Sequence[str] = (), *, progress: Progress | None = None, pace: Pace | None = None
    ) -> list[Outcome]:
        """Do what the rollouts say, and bring `targets` besides. Raises FleetError, SourceError."""
        plan = await self.plan(targets)
        for slot in plan.cancel:
            await self.updater.call_off(slot, f"Its rollout says: {plan.reasons[slot]}.")
        for slot in plan.drop:
            await self.updater.drop(slot)
        done = asyncio.Event()
        watching = asyncio.ensure_future(self._watch(targets, done))
        try:
            return await self.updater.pull(plan.assignments, progress=progress, pace=pace)
        finally:
            done.set()  # a look that ends just now can swallow the cancellation
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _watch(self, targets: Sequence[str], done: asyncio.Event) -> None:
        """Call off what its rollout takes back while it is on its way, since a download can take days."""
        while not done.is_set():
            await asyncio.sleep(WATCH_S)
            try:
                plan = await self.plan(targets)
                latest = self.updater.ledger.latest()
                for slot in plan.cancel:
                    self.updater.ledger.ask_to_cancel(latest[slot].id)
            except LichenError as error:
                log.info("The rollouts cannot be looked at just now: %s", error)

    async def plan(self, targets: Sequence[str] = ()) -> Plan:
        """What this machine should have now. Raises FleetError and its kinds, SourceError."""
        import httpx

        async with httpx.AsyncClient(follow_redirects=False, timeout=httpx.Timeout(20)) as client:
            mirrors: list[Fetcher] | None = [fetcher_for(url, client) for url in self._urls] or None
            policies = []
            for target in await self._device.listed("policies", running=self._running, mirrors=mirrors):
                try:
                    policies.append(await self._policy(target.manifest.name, mirrors))
                except ManifestError as error:  # a document of another kind, or for a newer lichen
                    log.info("%s is no rollout that this lichen reads: %s", target.manifest.path, error)
        followed = [policy for policy in policies if policy is not None]
        slots, latest = Slots(self._store.root).mendable(), self.updater.ledger.latest()
        under_way = {slot: update for slot, update in latest.items() if not update.ended}
        return planned(followed, targets, slots, under_way, self._facts, self._clock())

    async def _policy(self, name: str, mirrors: list[Fetcher] | None) -> Policy | None:
        kept = self._folder / "policies"
        return await fetch_policy(self._device, name, kept=kept, running=self._running, mirrors=mirrors)

    async def tell(self) -> int:
        """Send what the collector has not heard of; how many reports. Raises SourceError, FleetError."""
        import httpx

        if self._bundle.collector is None:
            return 0
        async with httpx.AsyncClient(follow_redirects=False, timeout=httpx.Timeout(20)) as client:
            return await self.reporter.flush(http_post(client, self._bundle.collector))

    def served(self, counts: Mapping[str, Served]) -> None:
        """Report what the versions in use have answered so far. counts: by sha256; what is unknown there is
        not reported on, nor what has answered nothing. Raises FleetError."""
        slots = Slots(self._store.root).mendable()
        for name, update in self.updater.ledger.latest().items():
            active = slots.get(name, Slot()).active
            count = counts.get(update.sha256, NOTHING_SERVED)
            serves = active is not None and active.sha256 == update.sha256
            if serves and update.state == "confirmed" and count.requests:
                self.reporter.put(told(update, count, at=self._clock()))

    def _facts(self, slot: Slot) -> DeviceFacts:
        has = slot.active if slot.confirmed else slot.previous  # a version on trial is not had yet
        return DeviceFacts(
            id=self.reporter.id,
            tags=self._bundle.tags,
            hardware=self._hardware,
            active=None if has is None else has.sha256,
            refused=frozenset(slot.bad),
        )

    def _changed(self, update: Update) -> None:
        """A state was entered: kept for the collector, and told to whoever watches."""
        try:
            self.reporter.put(told(update))
        except FleetError as error:  # a report never holds up an update
            log.warning("A report was lost: %s", error)
        self._on_change(update)


def planned(
    policies: Sequence[Policy],
    targets: Sequence[str],
    slots: dict[str, Slot],
    under_way: dict[str, Update],
    facts: Callable[[Slot], DeviceFacts],
    now: float,
) -> Plan:
    """The plan from rollouts and wishes; a rollout's word counts over a wish. Pure. now: seconds since 1970.

    Without either, updates under way go on, and what is in use is kept up to date. Raises FleetError for a
    wish of no known kind.
    """
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    found: dict[str, Assignment] = {}
    dropped, cancelled, reasons = [], [], {}
    for policy in policies:
        name = f"{policy.kind}/{policy.name}"
        slot = slots.get(name, Slot())
        decision = decide(policy, facts(slot), moment)
        reasons[name] = decision.reason
        release = decision.release if decision.action != "keep" else None
        update = under_way.get(name)
        if update is not None and (release is None or release.sha256 != update.sha256):
            cancelled.append(name)
        if release is not None:
            found[name] = Assignment(
                slot=name,
                target=release.path,
                sha256=release.sha256,
                health=policy.health if decision.action == "take" else LENIENT,
                rollout=policy.name,
            )
        elif decision.action == "return" and slot.active is not None:
            dropped.append(name)
    for name, target in _wishes(targets, slots, under_way).items():
        if name not in reasons:
            found[name] = Assignment(slot=name, target=target)
    return Plan(
        assignments=tuple(found.values()), drop=tuple(dropped), cancel=tuple(cancelled), reasons=reasons
    )


def _wishes(targets: Sequence[str], slots: dict[str, Slot], under_way: dict[str, Update]) -> dict[str, str]:
    """Targets by slot: those that were named, or else what this machine has or is about to have."""
    for target in targets:
        if target.partition("/")[0] not in KINDS:
            raise FleetError(f"{target!r} is no target.", hint="Such as models/support or adapters/support.")
    if targets:
        return {target: target for target in targets}
    standing = {name: slot.active.target for name, slot in slots.items() if slot.active is not None}
    return standing | {name: update.target for name, update in under_way.items()}


def told(update: Update, served: Served = NOTHING_SERVED, *, at: float | None = None) -> UpdateReport:
    """An update as the collector is told of it: no words of this machine. at: None for its last state's."""
    measured = update.measured
    return UpdateReport(
        sequence=1,  # the outbox gives the real one
        at=max(0.0, update.entered if at is None else at),
        requests=served.requests,
        errors=served.errors,
        slot=update.slot,
        target=update.target,
        sha256=update.sha256,
        state=update.state,
        cause=update.cause,
        rate=measured.rate if measured is not None else None,
        rate_before=measured.rate_before if measured is not None else None,
        quality=measured.passed / measured.asked if measured is not None and measured.asked else None,
    )
