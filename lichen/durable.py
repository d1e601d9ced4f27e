"""Files that a reader sees whole, the old one or the new one, also after a power cut."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` durably and at once; its folder is made if need be. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in this folder durable, where a folder can be opened. Raises OSError."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class SealedFile:
    """A small file that carries its checksum, and the whole one before it, so that a torn one is noticed.

    title: its first words, which name the format. limit: bytes that are looked at. A file is written aside,
    synced and renamed; one that is torn all the same (a dying disk, a copy that broke off) fails its
    checksum, and the previous one is used: older, but whole.
    """

    def __init__(self, path: Path, title: str, *, limit: int = 16 << 20) -> None:
        self.path = path
        self.previous = path.with_name(f"{path.name}.previous")
        self._header = f"{title} sha256 ".encode()
        self._limit = limit

    def whole(self) -> Iterator[bytes]:
        """What the sound ones of both files hold, the newest first."""
        for path in (self.path, self.previous):
            body = self._read(path)
            if body is not None:
                yield body

    def present(self) -> bool:
        """Whether there is any of the two, sound or not."""
        return self.path.exists() or self.previous.exists()

    def save(self, body: bytes) -> None:
        """Replace it, unless it holds the same; a sound one becomes the previous one. Raises OSError."""
        current = self._read(self.path)
        if current == body:
            return
        if current is not None:
            self.path.replace(self.previous)
            sync_folder(self.path.parent)
        seal = hashlib.sha256(body).hexdigest().encode()
        write_file(self.path, self._header + seal + b"\n" + body, mode=0o600)

    def forget(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)

    def _read(self, path: Path) -> bytes | None:
        """What a sound file holds, or None."""
        try:
            if path.stat().st_size > self._limit:
                return None
            header, newline, body = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        sealed = header == self._header + hashlib.sha256(body).hexdigest().encode()
        return body if newline and sealed else None


def sync_tree(folder: Path) -> None:
    """Make a folder's files and its own entries durable, as they were written. Raises OSError."""
    for path in folder.iterdir():
        if path.is_file():
            handle = os.open(path, os.O_RDWR)  # Windows syncs only what may be written
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(folder)
