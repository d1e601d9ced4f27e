"""The adapters of one loaded model, as those see it who ask for them: leased, shared, and dropped when idle.

    lease = await adapters.lease(digest, file)
    ...  # the adapter stays in memory meanwhile
    lease.close()

A file is checked before the native loader sees it, once for each load. Beyond `limit` bytes the adapters go
that nobody has leased, the longest idle first; pinned ones stay. A lease that is dropped closes itself.
Safe from any thread and event loop. `adapter_bank.py` is the engine thread's half.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lichen.errors import LichenError, NotFound, OutOfMemory, Unavailable
from lichen.quant.adapter_check import check_adapter

if TYPE_CHECKING:
    from lichen.runtime.engine import Engine

DEFAULT_LIMIT = 1_000_000_000  # bytes


class AdapterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter in memory. bytes: of its numbers. users: how many hold it now."""

    sha256: str
    bytes: int
    pinned: bool
    users: int


@dataclass(slots=True, eq=False)
class _Held:
    """One adapter, from the first lease to its end; in the order of last use."""

    loaded: Future[None] = field(default_factory=Future)
    size: int = 0
    users: int = 0
    pinned: bool = False


class Lease:
    """Keeps an adapter in memory until `close`, which is idempotent, or until nobody refers to it."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def close(self) -> None:
        """The adapter may go."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        self.close()


class Adapters:
    """See the module. model: the file that the engine serves."""

    def __init__(self, engine: Engine, model: Path, limit: int = DEFAULT_LIMIT) -> None:
        self._engine = engine
        self._model = model
        self._limit = limit
        self._held: dict[str, _Held] = {}  # by digest, longest unused first
        self._lock = threading.RLock()  # a lease may be collected while it is held

    async def lease(self, digest: str, file: Path) -> Lease:
        """Have an adapter in memory, loaded first if need be; who asks meanwhile shares the load.

        Raises AdapterError, ModelFileError, Unavailable, and OutOfMemory when those in use leave no room.
        """
        with self._lock:
            held = self._held.pop(digest, None)
            first = held is None
            held = held or _Held()
            self._held[digest] = held
            held.users += 1
        lease = Lease(lambda: self._leave(held))
        if first:
            loop = asyncio.get_running_loop()
            await asyncio.shield(loop.run_in_executor(None, self._load, digest, file, held))
        await asyncio.shield(asyncio.wrap_future(held.loaded))
        return lease

    def pin(self, digest: str, pinned: bool = True) -> None:
        """Keep a loaded adapter also while nobody uses it, or let it go again. Raises NotFound."""
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                raise NotFound(f"The adapter {digest[:12]} is not in memory.", param="model")
            held.pinned = pinned

    def drop(self, digest: str) -> int:
        """Free an adapter, pinned or not; the bytes that come free. Raises NotFound, and Unavailable when it
        is used."""
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                raise NotFound(f"The adapter {digest[:12]} is not in memory.", param="model")
            if held.users:
                raise Unavailable(
                    f"The adapter {digest[:12]} is still answering.", hint="Unload it in a moment."
                )
            del self._held[digest]
            self._retire(digest)
            return held.size

    def status(self) -> list[AdapterStatus]:
        """The adapters in memory, the longest unused first."""
        with self._lock:
            return [
                AdapterStatus(sha256=digest, bytes=held.size, pinned=held.pinned, users=held.users)
                for digest, held in self._held.items()
                if held.size
            ]

    def _load(self, digest: str, file: Path, held: _Held) -> None:
        """On a thread: check the file, make room, and have the engine load it."""
        try:
            size = check_adapter(file, self._model).size
            with self._lock:
                self._make_room(size, held)
                held.size = size
            self._on_engine(lambda: self._engine.adapters.load(digest, file))
        except BaseException as error:
            with self._lock:
                if self._held.get(digest) is held:
                    del self._held[digest]
            held.loaded.set_exception(error)
            held.loaded.exception()  # nobody has to be waiting
        else:
            held.loaded.set_result(None)

    def _on_engine(self, work: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except LichenError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._engine.call(run)
        done.result()

    def _make_room(self, size: int, newest: _Held) -> None:
        taken = size + sum(held.size for held in self._held.values() if held is not newest)
        for digest, held in list(self._held.items()):
            if taken <= self._limit:
                return
            if not held.users and not held.pinned:
                del self._held[digest]
                self._retire(digest)
                taken -= held.size
        if taken > self._limit:
            raise OutOfMemory("An adapter", size, self._limit - taken + size)

    def _leave(self, held: _Held) -> None:
        with self._lock:
            held.users -= 1

    def _retire(self, digest: str) -> None:
        try:
            self._engine.call(lambda: self._engine.adapters.retire(digest))
        except Unavailable:  # the engine is gone, and its adapters with it
            return
