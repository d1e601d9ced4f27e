"""Past answers, for drafts: a bounded memory for each owner, in memory and on disk.

What one owner was answered never helps, and so never shows itself to, another: owners share nothing here.
Two generations of at most `GENERATION` tokens make forgetting free: when the younger is full it becomes
the older one, and what was the older is dropped.

A file holds both generations of one owner, `<folder>/<digest of model and owner>.answers`, in the byte
order of the machine:

    magic, version, tokens, digest of model and owner, digest of the tokens   (_FIXED)
    token ids, int32 each; SEPARATOR between answers

Answers are private: files are 0600 in a folder of 0700. It is a cache: whatever is wrong with a file costs
speed and a line in the log. Checksums protect against damage, not against whoever may write as this user.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lichen.runtime.speculation.index import SEPARATOR, SuffixIndex

log = logging.getLogger("lichen.speculation")

GENERATION = 16_384  # tokens; about 3 MB of memory each, 64 KB on disk
MAX_OWNERS = 8  # in memory; the one that was not here for longest goes first
MIN_ANSWER = 8  # tokens; a shorter answer teaches nothing
SAVE_EVERY = 16  # answers of one owner
MAGIC = b"LICHENSM"
VERSION = 1
SUFFIX = ".answers"
_FIXED = struct.Struct("=8sII32s32s")


class AnswerMemory:
    """The answers of one owner. `indexes`: the younger generation, and the older one if there is one."""

    def __init__(self) -> None:
        self._young = SuffixIndex()
        self._old: SuffixIndex | None = None
        self.unsaved = 0  # answers

    @property
    def indexes(self) -> list[SuffixIndex]:
        """What can be searched."""
        old = self._old
        return [self._young] if old is None else [self._young, old]

    def add(self, answer: Sequence[int]) -> None:
        """Remember an answer, its end if it is longer than a generation."""
        if len(answer) < MIN_ANSWER:
            return
        if len(self._young.tokens) + len(answer) >= GENERATION and self._young.tokens:
            self._old, self._young = self._young, SuffixIndex()
        self._young.extend([*answer[-GENERATION + 1 :], SEPARATOR])
        self.unsaved += 1

    def tokens(self) -> list[int]:
        """Everything, the older generation first."""
        return [token for index in reversed(self.indexes) for token in index.tokens]

    def recall(self, tokens: Sequence[int]) -> None:
        """Take what an earlier process remembered, as the older generation. Safe from another thread."""
        index = SuffixIndex(tokens[-2 * GENERATION :])
        if self._old is None:
            self._old = index


class AnswerMemories:
    """The memories of all owners of one model, whose vocabulary has `vocabulary` tokens. folder: None keeps
    nothing on disk; limit: bytes there.

    Used by the engine thread; files are read and written on a side thread.
    """

    def __init__(self, model: str, vocabulary: int, folder: Path | None = None, limit: int = 0) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._folder = folder if limit else None
        self._limit = limit
        self._memories: OrderedDict[str, AnswerMemory] = OrderedDict()
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lichen-answers")

    def open(self, owner: str) -> AnswerMemory:
        """The memory of an owner; what the disk holds of it arrives a moment later."""
        memory = self._memories.get(owner)
        if memory is None:
            memory = self._memories[owner] = AnswerMemory()
            if self._folder is not None:
                self._disk.submit(self._load, self._folder, owner, memory)
            while len(self._memories) > MAX_OWNERS:
                self._save(*self._memories.popitem(last=False))
        self._memories.move_to_end(owner)
        return memory

    def add(self, owner: str, answer: Sequence[int]) -> None:
        """Remember an answer of an owner."""
        memory = self.open(owner)
        memory.add(answer)
        if memory.unsaved >= SAVE_EVERY:
            self._save(owner, memory)

    def close(self) -> None:
        """Write what is not on disk yet. Blocks for the disk; idempotent."""
        for owner, memory in self._memories.items():
            self._save(owner, memory)
        self._memories.clear()
        self._disk.shutdown(wait=True)

    def _save(self, owner: str, memory: AnswerMemory) -> None:
        if self._folder is not None and memory.unsaved:
            memory.unsaved = 0
            self._disk.submit(self._write, self._folder, owner, memory.tokens())

    # Below: the side thread.

    def _load(self, folder: Path, owner: str, memory: AnswerMemory) -> None:
        path = self._path(folder, owner)
        try:
            memory.recall(read(path, self._digest(owner), self._vocabulary))
        except FileNotFoundError:
            pass
        except ValueError as fault:
            log.warning("Remembered answers were dropped: the file %s %s.", path, fault)
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("Remembered answers in %s cannot be read: %s", path, error)

    def _write(self, folder: Path, owner: str, tokens: list[int]) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write(self._path(folder, owner), self._digest(owner), tokens)
            _make_room(folder, self._limit)
        except OSError as error:
            log.warning("Answers cannot be remembered in %s: %s", folder, error)

    def _digest(self, owner: str) -> bytes:
        return hashlib.sha256(f"{self._model}\0{owner}".encode("utf-8", "surrogatepass")).digest()

    def _path(self, folder: Path, owner: str) -> Path:
        return folder / (self._digest(owner).hex() + SUFFIX)


def write(path: Path, owner: bytes, tokens: Sequence[int]) -> None:
    """Write token ids under an owner's digest, beside the place and renamed. Raises OSError."""
    packed = array("i", tokens).tobytes()
    header = _FIXED.pack(MAGIC, VERSION, len(tokens), owner, hashlib.sha256(packed).digest())
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(header + packed)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path, owner: bytes, vocabulary: int) -> list[int]:
    """The token ids [n] of a file, all below `vocabulary`.

    Raises OSError, or ValueError whose text goes on "the file ...".
    """
    size = path.stat().st_size
    if not _FIXED.size <= size <= _FIXED.size + 4 * 2 * GENERATION:
        raise ValueError("has a length that was never written")
    data = path.read_bytes()
    magic, version, count, written_for, digest = _FIXED.unpack_from(data)
    packed = data[_FIXED.size :]
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError("is not in this format")
    if written_for != owner:
        raise ValueError("belongs to somebody else")
    if len(packed) != 4 * count or hashlib.sha256(packed).digest() != digest:
        raise ValueError("is damaged")
    tokens = array("i", packed).tolist()
    if tokens and not SEPARATOR <= min(tokens) <= max(tokens) < vocabulary:
        raise ValueError("holds tokens that the model does not have")
    return tokens


def _make_room(folder: Path, limit: int) -> None:
    """Remove the files that were not written for longest, until the limit holds."""
    files = []
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
