"""Which version of what the fleet sent is in use: one small file, replaced whole, is the switch.

    <store>/active             slots by "kind/name": the version in use, the one before, and what failed
    <store>/active.previous    the file before

Activation, confirmation and going back are each one replacement of that file, so whoever reads it (a request
for `fleet:NAME`) finds the old version or the new one. The bytes are blobs of the store. A version whose blob
is not whole is not served: the one before it is. This module knows no TUF and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from lichen.durable import SealedFile
from lichen.errors import NotFound, StoreError
from lichen.sync.manifest import AnyManifest, Sha256

BAD_KEPT = 64  # versions of a slot that are remembered as bad


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version that is here. target: the path that the fleet signed. sha256: hex, of its bytes."""

    target: str
    sha256: Sha256
    manifest: AnyManifest


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A name and its versions. confirmed: the active one has passed its trial.

    bad: sha256 of versions that failed here, the latest last.
    """

    active: Version | None = None
    previous: Version | None = None
    confirmed: bool = True
    bad: tuple[Sha256, ...] = ()


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    slots: dict[str, Slot]


class Slots:
    """The slots of the store under `root`. One process at a time changes them (see updater.py)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file = SealedFile(root / "active", "lichen active versions 1")

    def load(self) -> dict[str, Slot]:
        """Every slot. Raises StoreError if both files are torn."""
        for slots in self._sound():
            return slots
        if self._file.present():
            raise StoreError(
                f"{self._file.path}, which says what is in use, is damaged.",
                hint="Mend it from the record of updates: lichen fleet pull",
            )
        return {}

    def mendable(self) -> dict[str, Slot]:
        """As `load`, but nothing of two torn files."""
        return next(iter(self._sound()), {})

    def serving(self, slot: str) -> Version:
        """The version of a slot that can be used: the active one, or where that is not whole the one before.

        Raises NotFound, StoreError.
        """
        found = self.load().get(slot, Slot())
        for version in (found.active, found.previous):
            if version is not None and self.whole(version):
                return version
        raise NotFound(
            f"Nothing is here under the fleet's name {slot.partition('/')[2]!r}.",
            hint=f"Get it: lichen fleet pull {slot}",
            param="model",
        )

    def switch(self, slot: str, version: Version) -> None:
        """Put a version into use, on trial. The one in use becomes the previous one. Raises StoreError."""

        def change(old: Slot) -> Slot:
            if old.active is not None and old.active.sha256 == version.sha256:
                return old
            kept = old.active if old.confirmed else old.previous
            return Slot(active=version, previous=kept, confirmed=False, bad=old.bad)

        self._change(slot, change)

    def confirm(self, slot: str) -> None:
        """The active version has passed. Raises StoreError."""
        self._change(slot, lambda old: msgspec.structs.replace(old, confirmed=True))

    def go_back(self, slot: str, *, bad: bool) -> None:
        """Put the previous version into use again, if the active one is on trial. Raises StoreError.

        bad: remember the one that goes, so that it is not tried again.
        """

        def change(old: Slot) -> Slot:
            if old.confirmed or old.active is None:
                return old
            marked = _marked(old.bad, old.active.sha256) if bad else old.bad
            return Slot(active=old.previous, previous=None, confirmed=True, bad=marked)

        self._change(slot, change)

    def drop(self, slot: str) -> None:
        """Take a slot out of use; what was bad stays bad. Raises StoreError."""
        self._change(slot, lambda old: Slot(bad=old.bad))

    def condemn(self, slot: str, sha256: str) -> None:
        """Remember a version that was never in use as bad. Raises StoreError."""
        self._change(slot, lambda old: msgspec.structs.replace(old, bad=_marked(old.bad, sha256)))

    def replace_damaged(self, slot: str) -> None:
        """The active version's bytes are gone: the previous one takes its place. Raises StoreError."""
        self._change(slot, lambda old: Slot(active=old.previous, confirmed=True, bad=old.bad))

    def held(self) -> set[str]:
        """sha256 of every blob that either file names, so that it must stay."""
        versions = (
            version
            for slots in self._sound()
            for slot in slots.values()
            for version in (slot.active, slot.previous)
        )
        return {version.sha256 for version in versions if version is not None}

    def _sound(self) -> list[dict[str, Slot]]:
        found = []
        for body in self._file.whole():
            try:
                found.append(msgspec.json.decode(body, type=_Body).slots)
            except msgspec.DecodeError:
                continue
        return found

    def _change(self, slot: str, change: Callable[[Slot], Slot]) -> None:
        slots = self.mendable()
        slots[slot] = change(slots.get(slot, Slot()))
        try:
            self._file.save(msgspec.json.encode(_Body(slots), order="deterministic"))
        except OSError as error:
            raise StoreError(f"{self._file.path} cannot be written: {error.strerror}.") from error

    def whole(self, version: Version) -> bool:
        """Whether the blob has its length; its hash was checked before it was put into use."""
        try:
            return self.blob(version.sha256).stat().st_size == version.manifest.size
        except OSError:
            return False

    def blob(self, sha256: str) -> Path:
        """Where the bytes lie."""
        return self._root / "blobs" / "sha256" / sha256


def _marked(bad: tuple[Sha256, ...], sha256: str) -> tuple[Sha256, ...]:
    return (*(each for each in bad if each != sha256), sha256)[-BAD_KEPT:]
