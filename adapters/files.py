"""Uploaded files to learn from, as OpenAI's files API has them: kept whole, checked, and seen by one key.

Layout: `<folder>/file-<24 hex digits>.jsonl` is the content and `.json` beside it what is known of it,
which is written last and removed first, so that a file is there once it is whole and durable.
Files are 0600 in a folder of 0700. Everything here blocks: call it off the event loop.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lichen.adapters.records import LessonKind
from lichen.durable import sync_folder
from lichen.errors import JournalError, JournalFull, NotFound, PayloadTooLarge

MAX_FILE = 512 << 20  # bytes, as OpenAI has it
MAX_FILES = 10_000
STALE_S = 3600.0  # what an upload left behind this long ago belongs to nobody any more
_ID = re.compile(r"file-[0-9a-f]{24}")

log = logging.getLogger("lichen.journal")


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one file. size in bytes, created in seconds since 1970; owner: id of an API key.

    train, held_out: lessons on each side of the split; duplicates: lines that are left out.
    """

    id: str
    owner: str
    name: str
    size: int
    sha256: str
    created: int
    kind: LessonKind
    train: int
    held_out: int
    duplicates: int


class Upload:
    """A file that arrives: `write` its bytes, then `FileStore.keep` it or `abandon` it."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.size = 0
        self.hash = hashlib.sha256()
        self._room = room
        with _translated():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._stream = os.fdopen(handle, "wb")

    def write(self, data: bytes) -> None:
        """Append bytes. Raises PayloadTooLarge past MAX_FILE, and JournalFull."""
        self.size += len(data)
        if self.size > MAX_FILE:
            raise PayloadTooLarge(f"A file may have at most {MAX_FILE:,} bytes.", param="file")
        if self.size > self._room:
            raise _no_room()
        self.hash.update(data)
        with _translated():
            self._stream.write(data)

    def finish(self) -> None:
        """Make the bytes durable. Raises JournalFull."""
        with _translated():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    def abandon(self) -> None:
        """Leave nothing behind; nothing to do for one that was kept."""
        try:
            self._stream.close()
        except OSError as error:  # the bytes that the disk had no room for
            log.info("An upload was given up: %s.", error.strerror)
        self.path.unlink(missing_ok=True)


class FileStore:
    """The files in one folder, which is made with the first. limit: bytes of all files together."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder = folder
        self._limit = limit

    def begin(self) -> Upload:
        """Start an upload. Raises JournalFull and JournalError."""
        with _translated():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            room = self._limit - self._used()
        if room <= 0 or sum(1 for _ in self.folder.glob("file-*.json")) >= MAX_FILES:
            raise _no_room()
        return Upload(self.folder / f"{secrets.token_hex(12)}.part", room)

    def keep(self, upload: Upload, *, owner: str, name: str) -> StoredFile:
        """Check a complete upload and give it its place; durable when this returns.

        Raises LessonError naming the bad lines, JournalFull and JournalError.
        """
        from lichen.adapters.lessons import survey

        upload.finish()
        report = survey(upload.path)
        report.require_sound()
        assert report.kind is not None, "a sound file has lessons, and they have a kind"
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            owner=owner,
            name=name,
            size=upload.size,
            sha256=upload.hash.hexdigest(),
            created=int(time.time()),
            kind=report.kind,
            train=report.train,
            held_out=report.held_out,
            duplicates=report.duplicates,
        )
        with _translated():
            if self._used() > self._limit:  # others came in meanwhile
                raise _no_room()
            upload.path.rename(self._content(file.id))
            self._write(file)
        return file

    def files(self, owner: str | None = None) -> list[StoredFile]:
        """Files of one key, or (None) all, newest first; one whose description is damaged is left out."""
        found = []
        for path in self.folder.glob("file-*.json"):
            try:
                file = self._read(path)
            except JournalError as error:
                log.warning("%s", error)
                continue
            if owner in (None, file.owner):
                found.append(file)
        return sorted(found, key=lambda file: (file.created, file.id), reverse=True)

    def get(self, id: str, owner: str | None = None) -> StoredFile:
        """One file. Raises NotFound, also for somebody else's."""
        path = self.folder / f"{id}.json"
        if _ID.fullmatch(id) and path.is_file():
            file = self._read(path)
            if owner in (None, file.owner):
                return file
        raise NotFound(f"There is no file {id!r}.", hint="GET /v1/files lists them.", param="file_id")

    def content(self, id: str, owner: str | None = None) -> Path:
        """Where a file's bytes lie. Raises NotFound."""
        self.get(id, owner)
        return self._content(id)

    def delete(self, id: str, owner: str | None = None) -> None:
        """Remove a file. Raises NotFound, also for somebody else's, and JournalError.

        The journal does not hear of it here: see `Journal.forget_lessons`.
        """
        self.get(id, owner)
        with _translated():
            (self.folder / f"{id}.json").unlink()
            self._content(id).unlink(missing_ok=True)
            sync_folder(self.folder)

    def _content(self, id: str) -> Path:
        return self.folder / f"{id}.jsonl"

    def _used(self) -> int:
        return sum(entry.stat().st_size for entry in os.scandir(self.folder))

    def _read(self, path: Path) -> StoredFile:
        try:
            file = msgspec.json.decode(path.read_bytes(), type=StoredFile)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise JournalError(f"The description {path.name} of a file cannot be read: {error}.") from error
        if file.id != path.stem:
            raise JournalError(f"The description {path.name} is of another file.")
        return file

    def _write(self, file: StoredFile) -> None:
        staged = self.folder / f"{file.id}.part"
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(file), indent=2))
            stream.flush()
            os.fsync(stream.fileno())
        staged.rename(self.folder / f"{file.id}.json")
        sync_folder(self.folder)

    def _sweep(self) -> None:
        """Remove what a crash left: parts, and contents without a description."""
        stale = time.time() - STALE_S
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            half = path.suffix == ".part" or (
                path.suffix == ".jsonl" and not path.with_suffix(".json").exists()
            )
            if half and entry.stat().st_mtime < stale:
                path.unlink(missing_ok=True)


def _no_room() -> JournalFull:
    return JournalFull(
        "There is no room for another file.", hint="Delete some, raise files_limit, or free some disk space."
    )


@contextmanager
def _translated() -> Iterator[None]:
    """Raise JournalFull and JournalError for the system's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_room() from error
        raise JournalError(f"The file cannot be kept: {error.strerror or error}.") from error
