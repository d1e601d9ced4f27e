"""Where a publisher puts the bytes of targets: the seam at which other layouts (chunks, a bucket) plug in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from lichen.durable import sync_folder
from lichen.errors import FleetError


class TargetStore(Protocol):
    """Keeps targets by path and digest, so that an old and a new one of the same path stand side by side."""

    def put(self, path: str, source: Path, sha256: str) -> None:
        """Keep a file durably before its metadata is signed; again with the same digest is no work.

        path: the target's, such as "models/small". sha256: of `source`, in hex. Raises FleetError.
        """

    def url(self, path: str, sha256: str) -> str:
        """Where devices find it, relative to a mirror."""


class PlainTargets:
    """One whole file a target, `targets/<kind>/<sha256>.<name>`, as TUF's consistent snapshots name it."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def put(self, path: str, source: Path, sha256: str) -> None:
        """See TargetStore."""
        place = self._repository / self.url(path, sha256)
        if place.is_file():
            return
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

    def url(self, path: str, sha256: str) -> str:
        """See TargetStore."""
        folder, _, name = path.rpartition("/")
        return f"targets/{folder}/{sha256}.{name}"
