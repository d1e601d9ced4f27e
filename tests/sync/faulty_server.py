"""A static file server behind a bad link: it cuts, stalls, flips bits and is slow, by chance with a seed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from tests.sync.local_server import LocalServer
from tests.sync.range_server import RangeServer, _Handler


class FaultyServer(RangeServer):
    """Serves a folder. chance: of a fault in an answer. faults: how many of each there were.

    slow: bytes a second of an answer on a slow link.
    """

    def __init__(self, folder: Path, *, chance: float, slow: float = 50_000, seed: int = 1) -> None:
        self.folder, self.pause, self.ignore_ranges = folder, 0.0, False
        self.requests: list[tuple[str, str]] = []
        self.chance, self.slow, self.random = chance, slow, random.Random(seed)
        self.faults = {"cut": 0, "stall": 0, "flip": 0, "slow": 0}
        LocalServer.__init__(self, _FaultyHandler, "mirror")


class _FaultyHandler(_Handler):
    mirror: FaultyServer

    def do_GET(self) -> None:
        mirror = self.mirror
        fault = mirror.random.choice(list(mirror.faults)) if mirror.random.random() < mirror.chance else ""
        if fault:
            mirror.faults[fault] += 1
        if fault == "stall":
            time.sleep(1)
        kept = self.wfile
        self.wfile = _Link(kept, fault, mirror.slow)  # type: ignore[assignment] # only its `write` is used
        try:
            super().do_GET()
        except ConnectionError:
            self.close_connection = True
        finally:
            self.wfile = kept


class _Link:
    """What an answer is written to. The head goes through as it is."""

    def __init__(self, below: Any, fault: str, slow: float) -> None:
        self._below, self._fault, self._slow, self._parts = below, fault, slow, 0

    def write(self, data: bytes) -> int:
        """Pass bytes on, or do what the fault says."""
        self._parts += 1
        if self._parts > 1 and self._fault == "cut":
            self._below.write(data[: len(data) // 2])
            raise ConnectionError("cut")
        if self._parts > 1 and self._fault == "flip" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        if self._parts > 1 and self._fault == "slow":
            time.sleep(len(data) / self._slow)
        self._below.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
        self._below.flush()
