"""The file that is being put together: full length from the start, every chunk verified before it is written.

There is no journal of what is done: after a `kill -9` the file itself is hashed chunk by chunk (1.8 GB/s
here), which cannot claim a byte that is not there. All methods block; none is called from two threads for one
chunk.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

from lichen.errors import SourceError
from lichen.sync.download import check_space, write_error
from lichen.sync.recipe import Recipe


class Assembly:
    """The partial file of a recipe at `path`; `missing` holds the sha256 of chunks that are not in it yet."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self._recipe = path, recipe
        self._offsets: dict[bytes, list[int]] = {}
        at = 0
        for chunk in recipe.chunks:
            self._offsets.setdefault(chunk.sha256, []).append(at)
            at += chunk.length
        self.missing = set(self._offsets)
        self.done = 0  # bytes of the file that are there
        self._file = -1

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Make the file or find what an earlier run left in it. Raises StoreError, DiskFull."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        held = 0 if fresh else self.path.stat().st_blocks * 512
        check_space(self.path.parent, self._recipe.size - held)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self._recipe.size)
        except OSError as error:
            raise write_error(self.path, error) from error
        if not fresh:
            self._scan()

    def _scan(self) -> None:
        at = 0
        there: dict[bytes, bool] = {}
        for chunk in self._recipe.chunks:
            same = hashlib.sha256(os.pread(self._file, chunk.length, at)).digest() == chunk.sha256
            there[chunk.sha256] = same and there.get(chunk.sha256, True)
            at += chunk.length
        self.missing = {sha256 for sha256, whole in there.items() if not whole}
        self.done = sum(chunk.length for chunk in self._recipe.chunks if there[chunk.sha256])

    def write(self, sha256: bytes, data: bytes) -> None:
        """Put a chunk everywhere it belongs. Raises SourceError for other bytes; StoreError, DiskFull."""
        if hashlib.sha256(data).digest() != sha256:
            raise SourceError("A chunk has other bytes than its hash says.")
        try:
            for offset in self._offsets[sha256]:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], offset + written)
        except OSError as error:
            raise write_error(self.path, error) from error
        if sha256 in self.missing:
            self.missing.remove(sha256)
            self.done += len(data) * len(self._offsets[sha256])

    def restart(self) -> None:
        """Forget everything: the recipe turned out to be wrong."""
        os.ftruncate(self._file, 0)
        self.missing, self.done = set(self._offsets), 0

    def append(self, at: int, data: bytes) -> None:
        """Write bytes of the file as they come, unverified. Raises StoreError, DiskFull."""
        try:
            os.pwrite(self._file, data, at)
        except OSError as error:
            raise write_error(self.path, error) from error
        self.done = at + len(data)

    def close(self) -> None:
        """Close the file; what is in it stays for the next run."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
