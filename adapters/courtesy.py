"""One byte by which a daemon tells a trainer to wait: requests run, and the machine is theirs.

The byte lies in a file that both map into memory, so that telling costs nothing and asking is possible
between any two parts of a step. The trainer asks, and nobody is ever stopped from outside: where the daemon
dies, the trainer sees that its parent is gone and ends.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

FILE = "busy"


class Courtesy:
    """The byte of one job. Made by the daemon before the trainer starts, read by the trainer."""

    def __init__(self, folder: Path) -> None:
        """Map it; made where there is none. Raises OSError."""
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(handle).st_size < 1:
                os.write(handle, b"\0")
            self._byte = mmap.mmap(handle, 1)
        finally:
            os.close(handle)

    @property
    def busy(self) -> bool:
        """Whether the trainer should wait."""
        return self._byte[0] != 0

    @busy.setter
    def busy(self, value: bool) -> None:
        self._byte[0] = int(value)

    def close(self) -> None:
        """Let it go."""
        self._byte.close()
