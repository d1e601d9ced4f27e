"""The versions of one model's draft head, and which of them is served.

    <folder>/<version>.head.gguf      the newest has the highest number
    <folder>/serving.json             {"version": 7, "previous": 5}

A version appears whole, and `serving.json` is replaced as a whole, so whatever happens, a restart serves a
head that was served before, or none. A file that cannot be used costs speed and a line in the log.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import msgspec

from lichen.adapters.draft_head import DraftHead, read_head, write_head
from lichen.durable import write_file
from lichen.errors import LichenError

log = logging.getLogger("lichen.distil")

KEPT = 4  # versions; older ones are deleted
SUFFIX = ".head.gguf"
SERVING = "serving.json"


class _Serving(msgspec.Struct, forbid_unknown_fields=True):
    version: int = 0
    previous: int = 0


def head_folder(home: Path, base: str) -> Path:
    """Where the heads of a model lie. base: sha256 of its file, hex."""
    return home / "heads" / base[:16]


class HeadStore:
    """The heads of one model. base: sha256 of its file; vocabulary: its tokens; hidden: width of its states.
    Used by one thread."""

    def __init__(self, folder: Path, *, base: str, vocabulary: int, hidden: int) -> None:
        self.folder = folder
        self.base, self.vocabulary, self.hidden = base, vocabulary, hidden
        self._serving = _Serving()
        with suppress(OSError, msgspec.MsgspecError):
            self._serving = msgspec.json.decode((folder / SERVING).read_bytes(), type=_Serving)

    @property
    def version(self) -> int:
        """Of the head that is served; 0 for none."""
        return self._serving.version

    def path(self, version: int) -> Path:
        """The file of a version."""
        return self.folder / f"{version:06d}{SUFFIX}"

    def current(self) -> DraftHead | None:
        """The head to serve: the chosen one, else the one before it, else none."""
        for version in (self._serving.version, self._serving.previous):
            head = self._read(version)
            if head is not None:
                if version != self._serving.version:
                    self._serving = _Serving(version)
                return head
        self._serving = _Serving()
        return None

    def previous(self) -> DraftHead | None:
        """The head that was served before, if there is one."""
        return self._read(self._serving.previous)

    def add(self, head: DraftHead) -> int:
        """Keep a head and serve it from now on; its version. Raises LichenError or OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = self._versions()
        version = max([*there, self._serving.version], default=0) + 1
        write_head(self.path(version), head)
        self._serve(_Serving(version, self._serving.version))
        wanted = {*sorted([*there, version])[-KEPT:], version, self._serving.previous}
        for old in set(there) - wanted:
            self.path(old).unlink(missing_ok=True)
        return version

    def roll_back(self) -> None:
        """Serve the previous head from now on. Raises OSError."""
        self._serve(_Serving(self._serving.previous))

    def _serve(self, serving: _Serving) -> None:
        write_file(self.folder / SERVING, msgspec.json.encode(serving), mode=0o600)
        self._serving = serving

    def _versions(self) -> list[int]:
        names = (path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(int(name) for name in names if name.isdigit())

    def read(self, path: Path) -> DraftHead:
        """A head for this model from any file. Raises ModelFileError."""
        return read_head(path, base=self.base, vocabulary=self.vocabulary, hidden=self.hidden)

    def _read(self, version: int) -> DraftHead | None:
        if not version:
            return None
        try:
            return self.read(self.path(version))
        except LichenError as error:
            log.warning("Version %d of the draft head is left out. %s", version, error)
            return None
