"""How fast the disk under a folder reads and writes, measured on a file that is removed again."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

import msgspec

from lichen.errors import DiskFull, StoreError

_BLOCK = 1 << 20
_LEAST = 4 << 20  # bytes; below it, start-up costs drown the speed
_ROOM = 2  # times the file's size must be free: a measurement never fills a disk


class DiskSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes a second. cached: the file could not be dropped from memory, so `read` is that of memory."""

    read: float
    write: float
    cached: bool


def measure_disk(folder: Path, *, size: int = 64 << 20, budget_s: float = 1.0) -> DiskSpeed:
    """Write up to `size` bytes and read them back, each for about `budget_s` seconds at most.

    Written bytes count when they are on the disk (fsync). Before reading, Linux is asked to forget them.
    Raises DiskFull, StoreError.
    """
    from lichen.devices.probe import disk_free

    free = disk_free(folder)
    if free < _ROOM * size:
        raise DiskFull(str(folder), _ROOM * size, free)
    path = folder / f".speed.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            written, write_s = _write(handle, size, budget_s)
            cached = not _forget(handle)
            read, read_s = _read(handle, budget_s)
        finally:
            os.close(handle)
    except OSError as error:
        raise StoreError(f"The disk at {folder} cannot be measured: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be none
            path.unlink(missing_ok=True)
    return DiskSpeed(read=read / read_s, write=written / write_s, cached=cached)


def _write(handle: int, size: int, budget_s: float) -> tuple[int, float]:
    block = memoryview(os.urandom(_BLOCK))  # zeros would be stored as nothing by some file systems
    done, started = 0, time.perf_counter()
    while done < size and (done < _LEAST or time.perf_counter() - started < budget_s):
        done += os.write(handle, block)
        if done % (8 << 20) == 0:
            os.fsync(handle)
    os.fsync(handle)
    return done, max(time.perf_counter() - started, 1e-9)


def _read(handle: int, budget_s: float) -> tuple[int, float]:
    done, started = 0, time.perf_counter()
    os.lseek(handle, 0, os.SEEK_SET)
    while got := len(os.read(handle, _BLOCK)):
        done += got
        if done >= _LEAST and time.perf_counter() - started > budget_s:
            break
    return done, max(time.perf_counter() - started, 1e-9)


def _forget(handle: int) -> bool:
    """Whether the system was asked to drop a file from memory."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    advise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return True
