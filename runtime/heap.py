"""The C library's heap: how to get freed memory back to the system (glibc; elsewhere nothing is done)."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

_M_ARENA_MAX = -8  # malloc.h


def one_heap() -> None:
    """Let threads that start later share one C heap (glibc), so that `trim` reaches all that was freed.

    glibc never gives back the free top of a thread's own heap: of a model loaded by one thread and closed
    by another, up to 12 MB of 126 stayed.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Give what the C heap holds free back to the system, where the C library can (glibc)."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
