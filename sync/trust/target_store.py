"""Where a publisher puts the bytes of targets: whole files, and beside the larger ones their chunks."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lichen.durable import sync_folder
from lichen.errors import FleetError, SourceError, StoreError
from lichen.sync.manifest import RecipeFile
from lichen.sync.publish import publish_file
from lichen.sync.recipe import decode, recipe_path

SMALL = 1 << 16  # bytes; a recipe would cost more than it saves


class TargetStore(Protocol):
    """Keeps targets by path and digest, so that an old and a new one of the same path stand side by side."""

    def put(self, path: str, source: Path, sha256: str, *, older: Sequence[str] = ()) -> RecipeFile | None:
        """Keep a file durably before its metadata is signed; again with the same digest is no work.

        path: the target's, such as "models/small". sha256: of `source`, in hex. older: sha256 of versions
        that devices may have, the nearest first. Returns the recipe of its chunks, which is to be signed,
        or None where it is only kept whole. Raises FleetError.
        """

    def url(self, path: str, sha256: str) -> str:
        """Where devices find it, relative to a mirror."""


class PlainTargets:
    """One whole file a target, `targets/<kind>/<sha256>.<name>`, as TUF's consistent snapshots name it."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def put(self, path: str, source: Path, sha256: str, *, older: Sequence[str] = ()) -> RecipeFile | None:
        """See TargetStore."""
        place = self._repository / self.url(path, sha256)
        if place.is_file():
            return None
        staged = place.with_name(f".{place.name}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staged)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(place)
            sync_folder(place.parent)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise FleetError(f"{source} cannot be copied to {place.parent}: {error.strerror}.") from error
        return None

    def url(self, path: str, sha256: str) -> str:
        """See TargetStore."""
        folder, _, name = path.rpartition("/")
        return f"targets/{folder}/{sha256}.{name}"


class ChunkedTargets(PlainTargets):
    """Whole files as above, and beside them `recipes/` and `packs/` as `sync/publish.py` lays them out.

    Devices take chunks where they can and the whole file where they must. The whole file is what any other
    TUF client finds. A recipe, once signed, stays as it is.
    """

    def put(self, path: str, source: Path, sha256: str, *, older: Sequence[str] = ()) -> RecipeFile | None:
        """See TargetStore. The nearest older version that is still here gives differences."""
        super().put(path, source, sha256)
        if source.stat().st_size < SMALL:
            return None
        there = (self._repository / "targets").glob(f"*/{'[0-9a-f]' * 64}.*")
        known = {place.name.partition(".")[0]: place for place in there}
        previous = next((known[each] for each in older if each in known and each != sha256), None)
        place = self._repository / recipe_path(sha256)
        try:
            if not self._sound(place, sha256):
                publish_file(source, self._repository, previous=previous, whole=False)
            data = place.read_bytes()
        except (StoreError, OSError) as error:
            raise FleetError(f"{source} cannot be divided into chunks: {error}.") from error
        return RecipeFile(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    def _sound(self, place: Path, sha256: str) -> bool:
        """Whether there is a recipe already, with all its packs."""
        try:
            recipe = decode(place.read_bytes(), sha256)
        except (OSError, SourceError):
            return False
        return all((self._repository / pack.path).is_file() for pack in recipe.packs)
