"""What serves and the record of updates, brought together again after a death anywhere, or torn files.

Both are written one after the other (what serves first), and each can fall back to an older state of itself
by a torn write. What follows from each pair of states stands in `_mend`; it only ever finishes a step that
was begun, or takes it back, so that a slot serves its old version or its new one.
"""

from __future__ import annotations

from lichen.sync.store import Store
from lichen.sync.updates.ledger import Ledger
from lichen.sync.updates.slots import Slot, Slots, Version
from lichen.sync.updates.states import NEXT, Cause, Update, advanced


def recover(store: Store, slots: Slots, ledger: Ledger, now: float) -> None:
    """Mend every slot. now: seconds since 1970. Blocks. Raises StoreError."""
    latest, found = ledger.latest(), slots.mendable()
    for name in sorted({*latest, *found}):
        update, slot = latest.get(name), found.get(name, Slot())
        _mend(_Pair(store, slots, ledger, now), name, update, slot)
        _put_whole_in_front(store, slots, ledger, name, now)


class _Pair:
    """What is mended, and when."""

    def __init__(self, store: Store, slots: Slots, ledger: Ledger, now: float) -> None:
        self.store, self.slots, self.ledger, self.now = store, slots, ledger, now

    def whole(self, update: Update) -> bool:
        """Whether an update's bytes are here in their length."""
        try:
            return self.store.blob(update.sha256).stat().st_size == update.size
        except OSError:
            return False

    def switch(self, update: Update, *, confirmed: bool) -> None:
        """Put an update's version into use again."""
        version = Version(target=update.target, sha256=update.sha256, manifest=update.manifest)
        self.slots.switch(update.slot, version)
        if confirmed:
            self.slots.confirm(update.slot)

    def end(self, update: Update, cause: Cause, reason: str) -> None:
        """Note that an update was rolled back."""
        self.ledger.save(advanced(update, "rolled_back", self.now, cause=cause, reason=reason))


def _mend(pair: _Pair, name: str, update: Update | None, slot: Slot) -> None:
    serves = update is not None and slot.active is not None and slot.active.sha256 == update.sha256
    if update is None or (update.ended and not serves):
        _mend_lost(pair, name, update, slot)
    elif update.ended:
        if update.state == "confirmed":
            pair.slots.confirm(name)
        elif not slot.confirmed:
            pair.slots.go_back(name, bad=update.cause == "unhealthy")
    elif serves:
        while update.state != "active":  # the switch was made, and the record had not heard of it
            update = pair.ledger.save(advanced(update, NEXT[update.state], pair.now))
        if slot.confirmed:
            pair.ledger.save(advanced(update, "confirmed", pair.now))
    elif update.sha256 in slot.bad:
        pair.end(update, "unhealthy", "It failed its trial.")
    elif update.state == "active":
        if pair.whole(update):
            pair.switch(update, confirmed=False)  # the switch was torn
        else:
            pair.end(update, "failed", "Its bytes were damaged on this machine.")


def _mend_lost(pair: _Pair, name: str, update: Update | None, slot: Slot) -> None:
    """The record has nothing of what serves, or nothing serves of what the record confirmed."""
    if slot.active is not None and not slot.confirmed:
        pair.ledger.add(_adopted(name, slot.active, pair.now))  # its trial begins again
    elif slot.active is None and update is not None and update.state == "confirmed" and pair.whole(update):
        pair.switch(update, confirmed=True)


def _adopted(name: str, version: Version, now: float) -> Update:
    return Update(
        id=0,
        slot=name,
        target=version.target,
        sha256=version.sha256,
        size=version.manifest.size,
        manifest=version.manifest,
        state="active",
        begun=now,
        entered=now,
    )


def _put_whole_in_front(store: Store, slots: Slots, ledger: Ledger, name: str, now: float) -> None:
    """A version whose bytes are torn gives way to the one before it, and is fetched again."""
    slot = slots.mendable().get(name, Slot())
    if slot.active is None or slots.whole(slot.active):
        return
    store.blob(slot.active.sha256).unlink(missing_ok=True)
    update = ledger.latest().get(name)
    if update is not None and not update.ended:
        _Pair(store, slots, ledger, now).end(update, "failed", "Its bytes were damaged on this machine.")
    slots.replace_damaged(name)
