"""`python -m bench.neighbour LEAVE MOST`: another program that wants memory, for a benchmark of memory pressure.

Takes memory piece by piece until only LEAVE bytes may still be taken on this machine (within its control group),
gives back what is less, and holds at most MOST bytes. It is what the kernel ends first when memory runs
out. Ends with SIGTERM, or when its standard input is closed, so that it never outlives its benchmark.
"""

from __future__ import annotations

import mmap
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lichen.devices.probe import memory_left

PIECE = 32 << 20  # bytes
EVERY_S = 0.2

_TOUCHED = b"\1" * (PIECE // mmap.PAGESIZE)


class Held:
    """What it holds. left: tells the bytes that may still be taken."""

    def __init__(self, leave: int, most: int, left: Callable[[], int] = memory_left) -> None:
        self._leave, self._most, self._left = leave, most, left
        self._pieces: list[mmap.mmap] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._pieces) * PIECE

    def turn(self) -> None:
        """Take or give back as many pieces as bring what is left near to what is to be left."""
        left = self._left()
        while left - PIECE >= self._leave and self.size + PIECE <= self._most:
            piece = mmap.mmap(-1, PIECE)
            piece[:: mmap.PAGESIZE] = _TOUCHED  # a page that nobody wrote to takes no memory
            self._pieces.append(piece)
            left = min(left - PIECE, self._left())
        while left < self._leave and self._pieces:
            self._pieces.pop().close()
            left += PIECE


def main() -> None:
    """See the module."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    held = Held(int(sys.argv[1]), int(sys.argv[2]))
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        before = held.size
        held.turn()
        if held.size != before:
            print(f"{time.monotonic():.1f} {held.size}", flush=True)


if __name__ == "__main__":
    main()
