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
    pair = _Pair(store, slots, ledger, now)
    found = slots.mendable()
    for update in reversed(ledger.all()):
        if update.slot not in found and update.state == "confirmed" and pair.whole(update):
            pair.switch(update, confirmed=True)  # both files of slots were lost
            found = slots.mendable()
    latest = ledger.latest()
    for name in sorted({*latest, *found}):
        _mend(pair, name, latest.get(name), found.get(name, Slot()))
        _put_whole_in_front(pair, name)


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
        if slot.active is not None and not slot.confirmed:
            pair.ledger.add(_adopted(name, slot.active, pair.now))  # the record was lost
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
    else:
        _mend_unserved(pair, name, update, slot)


def _mend_unserved(pair: _Pair, name: str, update: Update, slot: Slot) -> None:
    """An update that has not ended and does not serve: most are only on their way."""
    if slot.active is not None and not slot.confirmed:  # the record is older than what serves
        pair.end(update, "superseded", f"{slot.active.target} came instead.")
        pair.ledger.add(_adopted(name, slot.active, pair.now))
    elif update.sha256 in slot.bad:
        pair.end(update, "unhealthy", "It failed its trial.")
    elif update.state in ("staged", "active") and not pair.whole(update):  # torn since they were hashed
        pair.store.blob(update.sha256).unlink(missing_ok=True)
        pair.end(update, "failed", "Its bytes were damaged on this machine.")
    elif update.state == "active":
        pair.switch(update, confirmed=False)  # the switch was torn


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


def _put_whole_in_front(pair: _Pair, name: str) -> None:
    """A version whose bytes are torn gives way to the one before it, and is fetched again."""
    slot = pair.slots.mendable().get(name, Slot())
    if slot.active is None or pair.slots.whole(slot.active):
        return
    pair.store.blob(slot.active.sha256).unlink(missing_ok=True)
    update = pair.ledger.latest().get(name)
    if update is not None and not update.ended:
        pair.end(update, "failed", "Its bytes were damaged on this machine.")
    pair.slots.replace_damaged(name)
