"""Getting a published file: only the chunks that are not here, from any mirror, each verified.

    chunks in the partial file   what an earlier run got (hashed again, never believed)
    chunks in stored blobs       copied, or used as bases of differences
    pieces in packs              several ranges at once, each from the mirror that serves best
    ranges of the whole file     when packs fail on every mirror
    the whole file, plainly      when the chunks do not give the promised sha256: the recipe was wrong

Invariants: the blob's name exists only after its whole sha256 held. Memory is bounded by connections, not by
the file. Killed at any moment, a run loses at most the piece that each connection was reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TypeVar

from lichen.errors import HashMismatch, OfflineError, SourceError
from lichen.sync.assembly import Assembly
from lichen.sync.download import hash_file
from lichen.sync.meter import Meter, Progress
from lichen.sync.mirrors import PATIENCE, Mirror
from lichen.sync.pace import Pace
from lichen.sync.recipe import HEX, MAX_RECIPE, Recipe, check, decode, recipe_path
from lichen.sync.spans import Want, from_packs, from_whole
from lichen.sync.store import Store
from lichen.sync.stored import StoredChunks, keep
from lichen.sync.transfer import OffLoop, Transfer

CONNECTIONS = 4
COPIED_AT_ONCE = 32  # chunks copied from stored blobs between two looks at the event loop

_Result = TypeVar("_Result")


async def find_recipe(sha256: str, mirrors: Sequence[Mirror]) -> Recipe:
    """The recipe of the file with this sha256 (hex), from the first mirror with a sound one.

    Raises SourceError with the last mirror's reason.
    """
    if not HEX.fullmatch(sha256):
        raise SourceError("A sha256 has 64 hexadecimal digits.")
    failure = SourceError("There is no mirror to ask for a recipe.")
    for mirror in mirrors:
        try:
            return await asyncio.to_thread(decode, await _load(mirror, recipe_path(sha256)), sha256)
        except SourceError as error:
            failure = error
    raise failure


async def _load(mirror: Mirror, path: str) -> bytes:
    data = bytearray()
    async with aclosing(mirror.read(path, 0, None)) as parts:
        async for part in parts:
            data += part
            if len(data) > MAX_RECIPE:
                raise SourceError(f"{mirror.name}/{path} has more than {MAX_RECIPE} bytes.")
    return bytes(data)


async def fetch(
    recipe: Recipe,
    mirrors: Sequence[Mirror],
    store: Store,
    *,
    progress: Progress | None = None,
    pace: Pace | None = None,
    connections: int = CONNECTIONS,
    patience: float = PATIENCE,
    whole: str | None = None,
) -> Path:
    """Have the recipe's file in the store; returns the blob. After a cancel the next call continues.

    mirrors: the preferred one first. pace: limits the rate. patience: seconds without a byte that are too
    many. whole: where mirrors keep the file as it is; None for where the recipe says. Raises SourceError when
    no mirror gives what is missing, HashMismatch when even the whole file is another, OfflineError, DiskFull
    or StoreError.
    """
    check(recipe, recipe.sha256)
    async with store.locked(f"chunks:{recipe.sha256}"):
        blob = store.blob(recipe.sha256)
        meter = Meter(recipe.size, progress)
        if not blob.is_file():
            unfinished = store.root / "partial" / f"{recipe.sha256}.chunks"
            with Assembly(unfinished, recipe) as assembly:
                job = _Fetch(recipe, mirrors, store, assembly, meter, pace, whole)
                await job.run(connections, patience)
            await asyncio.to_thread(store.place, unfinished, recipe.sha256)
            await asyncio.to_thread(keep, store, recipe)
        meter.report("done", recipe.size)
        return blob


class _Fetch:
    """One call of fetch, with its partial file."""

    def __init__(
        self,
        recipe: Recipe,
        mirrors: Sequence[Mirror],
        store: Store,
        assembly: Assembly,
        meter: Meter,
        pace: Pace | None,
        whole: str | None,
    ) -> None:
        self._recipe, self._mirrors, self._store = recipe, mirrors, store
        self._whole = whole or (recipe.whole_path if recipe.whole else None)
        self._assembly, self._meter, self._pace = assembly, meter, pace
        self._stored: StoredChunks | None = None

    async def run(self, connections: int, patience: float) -> None:
        """Fill the partial file until its whole sha256 holds."""
        threads = ThreadPoolExecutor(2, "chunks")

        async def off_loop(work: Callable[[], _Result]) -> _Result:
            return await asyncio.get_running_loop().run_in_executor(threads, work)

        transfer = Transfer(self._mirrors, self._assembly, self._meter, self._pace, off_loop, patience)
        try:
            self._meter.report("planning", 0)
            await off_loop(self._assembly.open)
            if self._assembly.missing:
                await self._use_stored(off_loop)
            if self._assembly.missing and self._store.offline:
                raise OfflineError(
                    f"Offline mode is on and {len(self._assembly.missing)} chunks are not here.",
                    hint="Run it without --offline.",
                )
            await transfer.get(self._pack_wants, self._read_base, connections)
            await transfer.get(self._whole_wants, self._read_base, connections)
            if self._assembly.missing:
                raise transfer.failure
            if not await self._sound(off_loop):
                await self._plainly(transfer, off_loop)
        finally:
            await asyncio.shield(
                asyncio.to_thread(threads.shutdown)
            )  # no thread writes after the file is closed

    async def _use_stored(self, off_loop: OffLoop) -> None:
        """Copy what blobs of the store have; keep their places for bases of differences."""
        wanted = self._assembly.missing | {
            piece.base for piece in self._recipe.pieces if piece.base is not None
        }

        def look() -> None:
            self._stored = StoredChunks(self._store, wanted)

        await off_loop(look)
        here = [sha256 for sha256 in self._assembly.missing if sha256 in self._known()]
        for first in range(0, len(here), COPIED_AT_ONCE):
            batch = here[first : first + COPIED_AT_ONCE]
            await off_loop(partial(self._copy, batch))
            self._meter.report("local", self._assembly.done)

    def _known(self) -> StoredChunks:
        assert self._stored is not None  # set before anything is planned
        return self._stored

    def _copy(self, batch: Sequence[bytes]) -> None:
        for sha256 in batch:
            data = self._known().read(sha256)
            if data is not None:
                self._assembly.write(sha256, data)

    def _read_base(self, sha256: bytes) -> bytes | None:
        return self._known().read(sha256)

    def _pack_wants(self, refused: set[tuple[bytes, bytes]]) -> dict[str, list[Want]]:
        def usable(sha256: bytes, base: bytes) -> bool:
            return base in self._known() and (sha256, base) not in refused

        return from_packs(self._recipe, self._assembly.missing, usable)

    def _whole_wants(self, _refused: set[tuple[bytes, bytes]]) -> dict[str, list[Want]]:
        return from_whole(self._recipe, self._assembly.missing, self._whole)

    async def _sound(self, off_loop: OffLoop) -> bool:
        def hashed() -> str:
            return hash_file(self._assembly.path, lambda done: self._meter.report("hashing", done))

        return await off_loop(hashed) == self._recipe.sha256

    async def _plainly(self, transfer: Transfer, off_loop: OffLoop) -> None:
        """The whole file from each mirror in turn, without the recipe's chunks, which do not give it."""
        for mirror in self._mirrors if self._whole is not None else ():
            self._assembly.restart()
            try:
                await transfer.stream(mirror, str(self._whole), self._recipe.size)
            except SourceError:
                continue
            if await self._sound(off_loop):
                return
        self._assembly.path.unlink(missing_ok=True)
        raise HashMismatch(
            f"What the mirrors have does not give the file with sha256 {self._recipe.sha256}.",
            hint="Nothing was kept; the publisher must publish it again.",
        )
