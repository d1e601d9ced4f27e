"""Shares a row of equal pieces of work out to threads, the calling one among them."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def diminishing(total: int, least: int, threads: int | None = None) -> list[int]:
    """Cuts, from 0 to `total`, between pieces for `share_out`: large ones first, `least` or more in each.

    Each piece is half of a thread's share of the rest (after guided self-scheduling: Polychronopoulos and
    Kuck, 1987). So few pieces wait for the GIL between them, and yet all threads end nearly together. Only
    the last piece may be smaller than `least`.
    """
    count = max(1, cores() if threads is None else threads)
    cuts = [0]
    while (rest := total - cuts[-1]) > 0:
        cuts.append(cuts[-1] + min(rest, max(1, least, rest // (2 * count))))
    return cuts


def share_out(pieces: int, work: Callable[[int], None], threads: int | None = None) -> None:
    """Call `work(0)` to `work(pieces - 1)`, each once, on up to `threads` threads (None: one a core).

    Whoever is free takes the next piece. Raises what the lowest failed piece raised; after a failure
    no further piece is begun. All threads are done with `work` when this returns or raises.
    """
    count = min(pieces, max(1, cores() if threads is None else threads))
    if count <= 1:
        for piece in range(pieces):
            work(piece)
        return
    turns = itertools.count()  # next() on it is atomic
    failures: dict[int, BaseException] = {}

    def take_turns() -> None:
        while (piece := next(turns)) < pieces and not failures:
            try:
                work(piece)
            except BaseException as failure:
                failures[piece] = failure

    others = [_workers().submit(take_turns) for _ in range(count - 1)]
    take_turns()
    _join(others)
    if failures:
        raise failures[min(failures)]


def _join(others: list[Future[None]]) -> None:
    """Wait for those that have begun; those that have not would find nothing left to do."""
    for other in others:
        if not other.cancel():
            other.result()


def _workers() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one set of threads a process
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="lichen-quant")
        return _pool


def _forget_workers() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that nobody will release."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
