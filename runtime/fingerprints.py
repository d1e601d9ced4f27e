"""Fingerprints of models on this machine: from the cache, or measured within a few seconds."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lichen.devices.curves import Fingerprint
from lichen.devices.fingerprint import Key, Task, fingerprint, tasks
from lichen.devices.fingerprint_cache import FingerprintCache
from lichen.devices.hardware import class_here
from lichen.devices.probe import probe
from lichen.devices.schedule import BUDGET_S, ROUNDS, Progress, measure, missing
from lichen.errors import StoreError
from lichen.runtime import native
from lichen.runtime.measuring import PREFIX, SOURCE, NativeBench

CACHE_FOLDER, SCRATCH_FOLDER = "fingerprints", "scratch"  # below lichen's home
_STALE_S = 3600.0  # age of scratch files that a killed process left


def take_fingerprint(
    model: Path,
    digest: str,
    home: Path,
    *,
    layout: str = SOURCE,
    again: bool = False,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    wanted: list[Task] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda now: None,
) -> Fingerprint | None:
    """The fingerprint of one layout of a model; None when it was stopped before all was measured once.

    digest: sha256 of the file. layout: "source", or the name of a type that its matrices are stored as.
    again: forget what was measured before. wanted: what to measure, by default all for this machine's cores.
    budget_s: for measuring; the first round comes in full, whatever it takes. Blocks; what was measured is
    kept below `home`, and the next call goes on from there. Raises what `NativeBench` does, and StoreError.
    """
    key = Key(hardware=class_here(), model=digest, layout=layout, library=native.version())
    cache = FingerprintCache(home / CACHE_FOLDER)
    wanted = tasks(probe().threads) if wanted is None else wanted
    if again:
        cache.forget(key)
    record = cache.find(key)
    if record is not None and not missing(record, wanted, rounds):
        return fingerprint(record, wanted)
    with NativeBench(model, layout, scratch=scratch_folder(home)) as bench:
        record = cache.load(key, bench.shape)
        cache.borrow(record, wanted)
        measure(
            bench,
            record,
            wanted,
            save=cache.save,
            rounds=rounds,
            budget_s=budget_s,
            stopped=stopped,
            progress=progress,
        )
    return fingerprint(record, wanted)


def scratch_folder(home: Path) -> Path:
    """Where cut models may lie, without what killed processes left there. Raises StoreError."""
    folder = home / SCRATCH_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}.") from error
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    return folder
