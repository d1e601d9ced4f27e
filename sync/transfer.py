"""Reading chunks from mirrors that fail: in rounds, each from a mirror that has not failed it yet.

A round plans what is missing, asks for it over several connections, and keeps every chunk that verifies;
whatever went wrong is simply still missing in the next round. So one bad chunk costs one chunk, and a mirror
that cuts, stalls or lies costs a detour. A mirror that fails several ranges of a round in a row is left alone
until the next.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from lichen.errors import SourceError
from lichen.sync.assembly import Assembly
from lichen.sync.meter import Meter
from lichen.sync.mirrors import Mirror
from lichen.sync.pace import Pace
from lichen.sync.pieces import unpack
from lichen.sync.spans import Span, Want, joined

CYCLES = 3  # how often every mirror is asked in vain for all that is missing, before it is given up
IN_A_ROW = 3  # failed ranges of a mirror that end its part in a round
SLOWEST = 4096  # bytes a second; a mirror that is slower for longer than the patience counts as failed

_Result = TypeVar("_Result")
Plan = Callable[[set[tuple[bytes, bytes]]], dict[str, list[Want]]]


class OffLoop(Protocol):
    """Runs blocking work on a thread that ends with the transfer."""

    async def __call__(self, work: Callable[[], _Result]) -> _Result: ...


class _BadPiece(SourceError):
    """A piece that arrived whole and is wrong."""


class Transfer:
    """Gets chunks from mirrors into an assembly. failure: why the last range failed."""

    def __init__(
        self,
        mirrors: Sequence[Mirror],
        assembly: Assembly,
        meter: Meter,
        pace: Pace | None,
        off_loop: OffLoop,
        patience: float,
    ) -> None:
        self._mirrors, self._assembly, self._meter, self._pace = mirrors, assembly, meter, pace
        self._off_loop, self._patience = off_loop, patience
        self.failure = SourceError("No mirror has what is missing.", hint="Name a mirror that has it.")
        self._blamed: dict[bytes, set[int]] = {}  # chunk -> mirrors that failed it
        self._faults = [0] * len(mirrors)  # in a row, of each mirror
        self._refused: set[tuple[bytes, bytes]] = set()  # differences that did not give their chunk

    async def get(self, plan: Plan, base: Callable[[bytes], bytes | None], connections: int) -> None:
        """Get what `plan` wants of the missing chunks, or as much of it as the mirrors give.

        plan: is given the differences not to use, as (chunk, base); wants by path. base: reads a chunk of the
        store.
        """
        vain = 0
        while self._assembly.missing and vain < CYCLES * len(self._mirrors):
            wants = await self._off_loop(partial(plan, self._refused))
            if not wants:
                return
            before = len(self._assembly.missing), len(self._refused)
            self._faults = [0 for _ in self._mirrors]
            await self._round(self._assign(wants), base, connections)
            if (len(self._assembly.missing), len(self._refused)) != before:
                vain = 0
                continue
            vain += 1
            if vain % len(self._mirrors) == 0:  # all were asked: perhaps the network is away
                await asyncio.sleep(min(0.2 * 2 ** (vain // len(self._mirrors)), self._patience, 10))

    def _assign(self, wants: dict[str, list[Want]]) -> deque[tuple[int, Span]]:
        """Each want's next mirror, as ranges."""
        queue: deque[tuple[int, Span]] = deque()
        for path, of_path in wants.items():
            shares: dict[int, list[Want]] = {}
            for want in of_path:
                blamed = self._blamed.get(want.chunk.sha256, set())
                if len(blamed) >= len(self._mirrors):
                    blamed.clear()
                choice = next(index for index in range(len(self._mirrors)) if index not in blamed)
                shares.setdefault(choice, []).append(want)
            for index, share in shares.items():
                queue.extend((index, span) for span in joined(path, share))
        return queue

    async def _round(
        self, queue: deque[tuple[int, Span]], base: Callable[[bytes], bytes | None], connections: int
    ) -> None:
        async def work() -> None:
            while queue:
                index, span = queue.popleft()
                await self._try(index, span, base)

        tasks = [asyncio.ensure_future(work()) for _ in range(max(1, min(connections, len(queue))))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _try(self, index: int, span: Span, base: Callable[[bytes], bytes | None]) -> None:
        try:
            if self._faults[index] < IN_A_ROW:
                await self._read(self._mirrors[index], span, base)
                self._faults[index] = 0
        except _BadPiece as error:
            self.failure = error
        except SourceError as error:
            self.failure = error
            self._faults[index] += 1
        for want in span.wants:
            if want.chunk.sha256 in self._assembly.missing:
                self._blamed.setdefault(want.chunk.sha256, set()).add(index)

    async def _read(self, mirror: Mirror, span: Span, base: Callable[[bytes], bytes | None]) -> None:
        """Every piece of a range, written at once. Raises SourceError; _BadPiece after all others."""
        bad: _BadPiece | None = None
        async with aclosing(mirror.read(span.path, span.start, span.stop)) as parts:
            reader = _Reader(parts, mirror.name, span, self._meter, self._pace, self._patience)
            for want in span.wants:
                stored = await reader.take(want)
                try:
                    await self._off_loop(partial(self._accept, want, stored, base))
                except SourceError as error:
                    bad = _BadPiece(f"{mirror.name}/{span.path}: {error.message}")
                self._meter.report("fetching", self._assembly.done)
        if bad is not None:
            raise bad

    def _accept(self, want: Want, stored: bytes, base: Callable[[bytes], bytes | None]) -> None:
        """Unpack, verify, write; a difference that does not give its chunk is not tried again."""
        try:
            under = None if want.base is None else base(want.base)
            if want.base is not None and under is None:
                raise SourceError("the chunk that a difference builds upon is not in the store any more.")
            self._assembly.write(want.chunk.sha256, unpack(stored, want.stride, want.chunk.length, under))
        except SourceError:
            if want.base is not None:
                self._refused.add((want.chunk.sha256, want.base))
            raise

    async def stream(self, mirror: Mirror, path: str, size: int) -> None:
        """A file of `size` bytes from its beginning to its end, unverified. Raises SourceError."""
        at = 0
        async with aclosing(mirror.read(path, 0, size)) as parts:
            while at < size:
                data = await _next(parts, mirror.name, self._patience)
                if len(data) > size - at:
                    raise SourceError(f"{mirror.name}/{path} sends more than {size} bytes.")
                self._meter.count(len(data))
                if self._pace is not None:
                    await self._pace.take(len(data))
                await self._off_loop(partial(self._assembly.append, at, data))
                at += len(data)
                self._meter.report("fetching", at)


class _Reader:
    """The pieces of one range out of parts of any length."""

    def __init__(
        self, parts: Any, name: str, span: Span, meter: Meter, pace: Pace | None, patience: float
    ) -> None:
        self._parts, self._name, self._meter, self._pace = parts, name, meter, pace
        self._patience = patience
        self._buffer = bytearray()
        self._at = span.start  # where the buffer begins
        self._due = span.stop - span.start  # bytes that have not come yet
        self._waited, self._came = 0.0, 0

    async def take(self, want: Want) -> bytes:
        """The stored bytes of the next want. Raises SourceError if the mirror is slow or sends too much."""
        skipped = want.offset - self._at
        while len(self._buffer) < skipped + want.stored:
            began = time.monotonic()
            data = await _next(self._parts, self._name, self._patience)
            self._waited += time.monotonic() - began
            self._came += len(data)
            self._due -= len(data)
            if self._due < 0:
                raise SourceError(f"{self._name} sends more than it was asked for.")
            if self._waited > self._patience and self._came < SLOWEST * self._waited:
                raise SourceError(f"{self._name} gives only {self._came / self._waited:.0f} bytes a second.")
            self._meter.count(len(data))
            if self._pace is not None:
                await self._pace.take(len(data))
            self._buffer += data
        stored = bytes(self._buffer[skipped : skipped + want.stored])
        del self._buffer[: skipped + want.stored]
        self._at = want.offset + want.stored
        return stored


async def _next(parts: Any, name: str, patience: float) -> bytes:
    """The next part. Raises SourceError when none comes in time, or at the end."""
    try:
        async with asyncio.timeout(patience):
            data: bytes = await anext(parts)
    except TimeoutError as error:
        raise SourceError(f"{name} has sent nothing for {patience:g} s.") from error
    except StopAsyncIteration as error:
        raise SourceError(f"{name} stopped in the middle of a range.") from error
    return data
