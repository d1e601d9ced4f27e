"""What a device trusts, kept in one file, so that it is never a mix of two states.

    trusted             a line with the sha256 of the rest, then the rest: JSON, bytes of each role
    trusted.previous    the one before

A file is written aside, synced and renamed. One that is torn all the same (a dying disk, a copy that broke
off) fails its checksum, and the previous one is used: older, but whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from lichen.durable import sync_folder, write_file
from lichen.errors import FleetError, TrustError

LIMIT = 256 << 20  # bytes of a file that is looked at
_HEADER = b"lichen trusted metadata 1 sha256 "


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: dict[str, bytes]


class Record:
    """The trusted metadata of one fleet under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trusted"
        self.previous = folder / "trusted.previous"

    def load(self) -> dict[str, bytes] | None:
        """Bytes by role of the newest whole file, None without any. Raises TrustError if all are torn."""
        for path in (self.path, self.previous):
            files = _read(path)
            if files is not None:
                return files
        if self.path.exists() or self.previous.exists():
            raise TrustError(
                f"The trusted metadata at {self.path} is damaged.",
                hint="Enrol this machine again: lichen fleet enrol BUNDLE --replace",
            )
        return None

    def save(self, files: Mapping[str, bytes]) -> None:
        """Replace what is trusted, unless it is the same. Raises FleetError if the disk refuses."""
        current = _read(self.path)
        if current == files:
            return
        body = msgspec.json.encode(_Body(dict(files)), order="deterministic")
        header = _HEADER + hashlib.sha256(body).hexdigest().encode() + b"\n"
        try:
            if current is not None:
                self.path.replace(self.previous)
                sync_folder(self.path.parent)
            write_file(self.path, header + body, mode=0o600)
        except OSError as error:
            raise FleetError(f"{self.path} cannot be written: {error.strerror}.") from error

    def forget(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, bytes] | None:
    """The files of a whole record, or None."""
    try:
        if path.stat().st_size > LIMIT:
            return None
        header, newline, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if not newline or header != _HEADER + hashlib.sha256(body).hexdigest().encode():
        return None
    try:
        return msgspec.json.decode(body, type=_Body).files
    except msgspec.DecodeError:
        return None
