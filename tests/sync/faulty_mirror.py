"""A mirror that fails on purpose: in memory, by a script, or by chance with a seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path

from lichen.errors import SourceError

FAULTS = ("cut", "stall", "corrupt", "shifted", "long", "refuse", "slow", "empty")
PART = 50_000  # bytes; no divisor of anything


class FaultyMirror:
    """Gives out the files of a published folder. Each read takes the next fault of the script; "" is none.

    chance: of a fault where the script is at its end. only: paths that begin so fail, others never do.
    """

    def __init__(
        self,
        folder: Path,
        script: Iterable[str] = (),
        *,
        name: str = "faulty",
        chance: float = 0,
        seed: int = 0,
        only: str = "",
    ) -> None:
        self.name = name
        self.files = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.reads: list[tuple[str, int, int]] = []
        self.sent = 0
        self._script, self._chance, self._only = list(script), chance, only
        self._random = random.Random(seed)

    def _fault(self, path: str) -> str:
        if not path.startswith(self._only):
            return ""
        if self._script:
            return self._script.pop(0)
        return self._random.choice(FAULTS) if self._random.random() < self._chance else ""

    async def read(self, path: str, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        """See lichen.sync.mirrors.Mirror."""
        fault = self._fault(path)
        if fault == "refuse" or path not in self.files:
            raise SourceError(f"{self.name} has no {path}.")
        data = self.files[path]
        stop = len(data) if stop is None else stop
        self.reads.append((path, start, stop))
        data = b"" if fault == "empty" else data[start:stop]
        if fault == "shifted":
            data = data[1:] + data[:1]
        if fault == "long":
            data += b"more"
        if fault == "corrupt":
            at = self._random.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        async for part in self._parts(data, fault):
            self.sent += len(part)
            yield part

    async def _parts(self, data: bytes, fault: str) -> AsyncGenerator[bytes, None]:
        half = self._random.randrange(len(data) + 1)
        for at in range(0, len(data), PART):
            await asyncio.sleep(0.01 if fault == "slow" else 0)
            if fault == "cut" and at >= half:
                raise SourceError(f"{self.name} broke off.")
            if fault == "stall" and at >= half:
                await asyncio.sleep(3600)
            yield data[at : at + PART]
