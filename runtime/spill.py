"""Computed beginnings of prompts on disk: one checked file each, found by their tokens.

It stores bytes under token ids and knows nothing of llama.cpp. It is a cache: whatever is wrong with a
file or with the disk costs a recomputation and a line in the log, never an answer. A file is written
beside its place and renamed, without fsync: after a power cut a checksum tells what was lost.
Checksums protect against damage, not against whoever may write as this user.

Layout: `<folder>/<digest of the CacheKey>/<digest of the tokens>.kv`, in the byte order of the machine:

    magic, version, tokens, payload bytes, digest of the key, digest of the payload   (_FIXED)
    token ids, int32 each
    digest of everything before
    payload

Token ids are prompts, and prompts are private: files are 0600 in folders of 0700.
Not covered: entries that another process writes after this one has started.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from lichen.errors import DiskFull
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.prefix import PrefixTree

log = logging.getLogger("lichen.spill")

MAGIC = b"LICHENKV"
VERSION = 1
MAX_TOKENS = 1 << 20  # in one entry: the largest context that can be configured
MAX_STORES = 32  # indexes of adaptations in memory
KEEP_FREE = 256 << 20  # bytes that a cache leaves to others on its disk
STALE_S = 3600.0  # a half-written file this old belongs to nobody any more
DIGEST = 32  # bytes: sha256, which processors compute themselves (46 MB in 26 ms; blake2b: 49)
_FIXED = struct.Struct(f"=8sIIQ{DIGEST}s{DIGEST}s")

Payload = bytes | bytearray


class CacheKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that cells depend on besides the tokens; entries of another key are not seen.

    Left out on purpose: thread count and batch shape, which change cells by rounding only.
    """

    model_sha256: str
    adapter_sha256: str
    adapter_scale: float
    template_sha256: str
    kv_type: str
    library_version: str
    context_layout: str


class _CorruptError(Exception):
    """A file that is not what it should be; the message ends the sentence "it ..."."""


@dataclass(slots=True, frozen=True)
class _Entry:
    path: Path
    tokens: list[int]


@dataclass(slots=True, frozen=True)
class _Header:
    tokens: list[int]
    length: int  # bytes of the payload
    digest: bytes  # of the payload


class SpillStore:
    """Entries of one key under `folder`, which all keys together fill up to `limit_bytes` (while one is
    written, that much more). Safe to use from several threads, and several processes may share a folder.

    Known entries are read once, on a thread that starts here; until then less is found.
    """

    def __init__(self, folder: Path, limit_bytes: int, key: CacheKey) -> None:
        self._root = folder
        self._limit = limit_bytes
        self._key = _digest(msgspec.json.encode(key))
        self._folder = folder / self._key.hex()
        self._lock = threading.Lock()  # guards the index; never held over file work
        self._writing = threading.Lock()
        self._tree = PrefixTree()
        self._entries: dict[int, _Entry] = {}
        self._ids: dict[str, int] = {}  # file name -> entry id
        self._next_id = 0
        self._complained = False
        self._indexing = threading.Thread(target=self._read_index, name="lichen-spill-index", daemon=True)
        self._indexing.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the entries that were on disk are known; at most `timeout` seconds."""
        self._indexing.join(timeout)
        return not self._indexing.is_alive()

    def match(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Length of the longest beginning of `tokens` that an entry holds, and the id of the shortest such
        entry; None when not even the first token is known."""
        with self._lock:
            length, holders = self._tree.match(tokens)
            if not holders:
                return None
            return length, min(holders, key=lambda entry: len(self._entries[entry].tokens))

    def tokens(self, entry_id: int) -> list[int]:
        """All tokens of an entry; empty when it is gone."""
        with self._lock:
            entry = self._entries.get(entry_id)
            return entry.tokens if entry is not None else []

    def read(self, entry_id: int) -> bytearray | None:
        """An entry's payload, its checksum verified; None when it is gone or damaged. Blocks for the disk."""
        with self._lock:
            entry = self._entries.get(entry_id)
        if entry is None:
            return None
        try:
            payload = self._read_payload(entry)
            _touch(entry.path)
            return payload
        except FileNotFoundError:  # another process made room
            self._forget(entry.path.name)
        except _CorruptError as fault:
            log.warning("A file of the prefix cache was removed: it %s (%s).", fault, entry.path)
            self._remove(entry.path)
        except (OSError, MemoryError) as error:
            self._complain("read", error)
            self._forget(entry.path.name)
        return None

    def write(self, tokens: Sequence[int], payload: Payload) -> bool:
        """Keep `payload` as what was computed for `tokens`, and make room for it; True when it was written.

        Nothing is written when an entry begins with these tokens already. Blocks for the disk; a full or
        failing disk is logged.
        """
        with self._writing:
            try:
                return self._write(list(tokens), payload)
            except (OSError, DiskFull) as error:
                self._complain("write", error)
                return False

    def discard(self, entry_id: int) -> None:
        """Remove an entry that turned out to be of no use."""
        with self._lock:
            entry = self._entries.get(entry_id)
        if entry is not None:
            self._remove(entry.path)

    def clear(self) -> None:
        """Remove every entry of this key."""
        self.wait_ready()
        with self._writing, self._lock:
            paths = [entry.path for entry in self._entries.values()]
        for path in paths:
            self._remove(path)

    def _write(self, tokens: list[int], payload: Payload) -> bool:
        size = _FIXED.size + 4 * len(tokens) + DIGEST + len(payload)
        if not 0 < len(tokens) <= MAX_TOKENS or not payload or size > self._limit or self._covers(tokens):
            return False
        for folder in (self._root, self._folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < size + KEEP_FREE:
            raise DiskFull(str(self._root), size + KEEP_FREE, free)
        packed = array("i", tokens).tobytes()
        fixed = _FIXED.pack(MAGIC, VERSION, len(tokens), len(payload), self._key, _digest(payload))
        path = self._folder / f"{_digest(packed).hex()}.kv"
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=self._folder)  # 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                for part in (fixed, packed, _digest(fixed, packed), payload):
                    stream.write(part)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _touch(path)
        self._add(path, tokens)
        self._remove_beginnings(tokens)
        self._evict()
        return True

    def _covers(self, tokens: list[int]) -> bool:
        """Whether an entry begins with all of `tokens`; it counts as used."""
        found = self.match(tokens)
        if found is None or found[0] < len(tokens):
            return False
        with self._lock:
            entry = self._entries.get(found[1])
        if entry is None:  # found damaged by a reader just now
            return self._covers(tokens)
        try:
            _touch(entry.path)
        except FileNotFoundError:
            self._forget(entry.path.name)
            return self._covers(tokens)
        return True

    def _remove_beginnings(self, tokens: list[int]) -> None:
        """Remove entries that a longer one has made superfluous."""
        with self._lock:
            paths = [
                entry.path
                for entry in self._entries.values()
                if len(entry.tokens) < len(tokens) and entry.tokens == tokens[: len(entry.tokens)]
            ]
        for path in paths:
            self._remove(path)

    def _evict(self) -> None:
        """Remove the least recently used files, of any key, until the limit holds."""
        files = sorted(_files(self._root, ".kv"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._limit:
                break
            self._remove(path)
            total -= size

    def _read_index(self) -> None:
        try:
            for used_ns, _, path in _files(self._root, ".tmp"):
                if time.time() - used_ns / 1e9 > STALE_S:
                    path.unlink(missing_ok=True)
            for _, _, path in _files(self._root, ".kv"):
                if path.parent == self._folder:
                    self._index(path)
        except OSError as error:
            self._complain("list", error)

    def _index(self, path: Path) -> None:
        try:
            with path.open("rb") as stream:
                self._add(path, _read_header(stream, self._key).tokens)
        except _CorruptError as fault:
            log.warning("A file of the prefix cache was removed: it %s (%s).", fault, path)
            self._remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain("read", error)

    def _read_payload(self, entry: _Entry) -> bytearray:
        with entry.path.open("rb") as stream:
            header = _read_header(stream, self._key)
            if header.tokens != entry.tokens:
                raise _CorruptError("holds other tokens than its name says")
            payload = bytearray(header.length)
            if stream.readinto(payload) != header.length or _digest(payload) != header.digest:
                raise _CorruptError("holds damaged cells")
            return payload

    def _add(self, path: Path, tokens: list[int]) -> None:
        with self._lock:
            if path.name in self._ids:
                return
            self._next_id += 1
            self._ids[path.name] = self._next_id
            self._entries[self._next_id] = _Entry(path, tokens)
            self._tree.assign(self._next_id, tokens)

    def _forget(self, name: str) -> None:
        with self._lock:
            entry_id = self._ids.pop(name, None)
            if entry_id is not None:
                del self._entries[entry_id]
                self._tree.assign(entry_id, ())

    def _remove(self, path: Path) -> None:
        if path.parent == self._folder:
            self._forget(path.name)
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def _complain(self, verb: str, error: Exception) -> None:
        """One warning a store; a disk that stays full must not fill the log."""
        level = logging.DEBUG if self._complained else logging.WARNING
        self._complained = True
        log.log(level, "The prefix cache in %s cannot be used to %s: %s", self._root, verb, error)


class SpillStores:
    """The stores of one model under `folder`, one for each adaptation; made when it is first asked for.

    plain: the key of the model without an adapter. Belongs to one thread.
    """

    def __init__(self, folder: Path, limit_bytes: int, plain: CacheKey) -> None:
        self._folder, self._limit, self._plain = folder, limit_bytes, plain
        self._stores: dict[Adaptation, SpillStore] = {PLAIN: SpillStore(folder, limit_bytes, plain)}

    def of(self, adaptation: Adaptation) -> SpillStore:
        """The store for what was computed so. The first call for an adapter starts to read its index."""
        store = self._stores.get(adaptation)
        if store is None:
            if len(self._stores) > MAX_STORES:  # the files stay; an index is read again when it is needed
                del self._stores[next(known for known in self._stores if known)]
            key = msgspec.structs.replace(
                self._plain, adapter_sha256=adaptation.digest, adapter_scale=adaptation.scale
            )
            store = self._stores[adaptation] = SpillStore(self._folder, self._limit, key)
        return store


def _digest(*parts: Payload) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _read_header(stream: BinaryIO, key: bytes) -> _Header:
    """The header at the start of a file. Raises _CorruptError for anything that this key did not write."""
    size = os.fstat(stream.fileno()).st_size
    fixed = stream.read(_FIXED.size)
    if len(fixed) < _FIXED.size:
        raise _CorruptError("is too short")
    magic, version, count, length, owner, digest = _FIXED.unpack(fixed)
    if magic != MAGIC or version != VERSION:
        raise _CorruptError("is not in this format")
    if owner != key:
        raise _CorruptError("belongs to another model")
    if not 0 < count <= MAX_TOKENS or size != _FIXED.size + 4 * count + DIGEST + length:
        raise _CorruptError("is not as long as it says")
    packed = stream.read(4 * count)
    if stream.read(DIGEST) != _digest(fixed, packed):
        raise _CorruptError("has a damaged header")
    return _Header(array("i", packed).tolist(), length, digest)


def _files(root: Path, suffix: str) -> Iterator[tuple[int, int, Path]]:
    """Time of last use (ns), size (bytes) and path of every file in the sub-folders of `root`."""
    with suppress(FileNotFoundError):
        for folder in root.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.glob(f"*{suffix}"):
                with suppress(FileNotFoundError):
                    status = path.stat(follow_symlinks=False)
                    yield status.st_mtime_ns, status.st_size, path


def _touch(path: Path) -> None:
    """Used now: the order of eviction is that of the modification times."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def file_identity(path: Path) -> str:
    """Stands for the hash of a file that nobody has hashed, which would take longer than to load it."""
    status = path.stat()
    return f"{path.resolve()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
