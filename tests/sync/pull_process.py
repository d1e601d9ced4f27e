"""A process that pulls one file by chunks, to be killed: `python pull_process.py STORE SHA256 URL COUNTER`.

COUNTER is a file whose first 8 bytes hold how many bytes the mirror has delivered, also after `kill -9`.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from lichen.sync.chunks import fetch, find_recipe
from lichen.sync.mirrors import HttpMirror
from lichen.sync.store import Store


class CountedMirror(HttpMirror):
    """Notes each part before anybody else has it."""

    def __init__(self, url: str, counter: int) -> None:
        super().__init__(url)
        self._counter, self._delivered = counter, 0

    async def read(self, path: str, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        """See lichen.sync.mirrors.Mirror."""
        async for part in super().read(path, start, stop):
            if path.startswith("packs/"):
                self._delivered += len(part)
                os.pwrite(self._counter, struct.pack("<Q", self._delivered), 0)
            yield part


async def main(store: str, sha256: str, url: str, counter: str) -> None:
    """Pull and leave."""
    handle = os.open(counter, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    mirror = CountedMirror(url, handle)
    recipe = await find_recipe(sha256, [mirror])
    await fetch(recipe, [mirror], Store(Path(store)))
    await mirror.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
