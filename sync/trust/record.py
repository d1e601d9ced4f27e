"""What a device trusts, kept in one file, so that it is never a mix of two states.

    trusted             a line with the sha256 of the rest, then the rest: JSON, bytes of each role
    trusted.previous    the one before

See `lichen.durable.SealedFile` for what happens when one is torn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from lichen.durable import SealedFile
from lichen.errors import FleetError, TrustError

LIMIT = 256 << 20  # bytes of a file that is looked at


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: dict[str, bytes]


class Record:
    """The trusted metadata of one fleet under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._file = SealedFile(folder / "trusted", "lichen trusted metadata 1", limit=LIMIT)
        self.path, self.previous = self._file.path, self._file.previous

    def load(self) -> dict[str, bytes] | None:
        """Bytes by role of the newest whole file, None without any. Raises TrustError if all are torn."""
        for body in self._file.whole():
            try:
                return msgspec.json.decode(body, type=_Body).files
            except msgspec.DecodeError:
                continue
        if self._file.present():
            raise TrustError(
                f"The trusted metadata at {self.path} is damaged.",
                hint="Enrol this machine again: lichen fleet enrol BUNDLE --replace",
            )
        return None

    def save(self, files: Mapping[str, bytes]) -> None:
        """Replace what is trusted, unless it is the same. Raises FleetError if the disk refuses."""
        try:
            self._file.save(msgspec.json.encode(_Body(dict(files)), order="deterministic"))
        except OSError as error:
            raise FleetError(f"{self.path} cannot be written: {error.strerror}.") from error

    def forget(self) -> None:
        """Remove both files."""
        self._file.forget()
