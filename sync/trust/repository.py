"""The metadata files of a repository on the publisher's disk: what is current, and what comes next."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp

from lichen.durable import write_file
from lichen.errors import FleetError

TOP_LEVEL = ("root", "targets", "snapshot", "timestamp")
_VERSIONED = re.compile(r"([1-9][0-9]{0,8})\.([a-z]+)\.json")

Part = TypeVar("Part", Root, Timestamp, Snapshot, Targets)


class Repository:
    """The repository under `folder`. Its files are believed: whoever can change them has no keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = folder / "metadata"

    def exists(self) -> bool:
        """Whether a first release was finished here."""
        return (self._metadata / "timestamp.json").is_file()

    def read(self, name: str) -> bytes:
        """A metadata file. Raises FleetError."""
        path = self._metadata / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise FleetError(f"{path} cannot be read: {error.strerror}.") from error

    def write(self, name: str, data: bytes) -> None:
        """Put a metadata file in its place, durably and at once. Raises OSError."""
        write_file(self._metadata / name, data)

    def root(self) -> Root:
        """The newest root. Raises FleetError if there is none."""
        versions = self._versions("root")
        if not versions:
            raise FleetError(f"There is no root metadata in {self._metadata}.")
        return self._parse(f"{max(versions)}.root.json", Root)

    def timestamp(self) -> Timestamp:
        """The current timestamp. Raises FleetError before the first release."""
        return self._parse("timestamp.json", Timestamp)

    def snapshot(self) -> Snapshot:
        """The snapshot that the timestamp names, or an empty one."""
        if not self.exists():
            return Snapshot(version=1, meta={})
        return self._parse(f"{self.timestamp().snapshot_meta.version}.snapshot.json", Snapshot)

    def targets(self, role: str) -> Targets:
        """The targets metadata of a role that the snapshot names. Raises FleetError."""
        meta = self.snapshot().meta.get(f"{role}.json")
        if meta is None:
            raise FleetError(f"The repository has no role {role!r}.")
        return self._parse(f"{meta.version}.{role}.json", Targets)

    def next_version(self, role: str) -> int:
        """A version that no file has, not even one that a killed step left behind."""
        return max(self._versions(role), default=0) + 1

    def expiries(self) -> dict[str, tuple[int, datetime.datetime]]:
        """Version and expiry of every role that counts now."""
        found: dict[str, Signed] = {
            "root": self.root(),
            "timestamp": self.timestamp(),
            "snapshot": self.snapshot(),
        }
        for name in self.snapshot().meta:
            role = name.removesuffix(".json")
            found[role] = self.targets(role)
        return {role: (signed.version, signed.expires) for role, signed in found.items()}

    def _versions(self, role: str) -> list[int]:
        if not self._metadata.is_dir():
            return []
        matches = (_VERSIONED.fullmatch(path.name) for path in self._metadata.iterdir())
        return [int(match[1]) for match in matches if match and match[2] == role]

    def _parse(self, name: str, kind: type[Part]) -> Part:
        try:
            metadata: Metadata[Part] = Metadata.from_bytes(self.read(name))
        except RepositoryError as error:
            raise FleetError(f"{self._metadata / name} is damaged: {error}.") from error
        if not isinstance(metadata.signed, kind):
            raise FleetError(f"{self._metadata / name} is not what its name says.")
        return metadata.signed
