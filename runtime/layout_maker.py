"""The process that makes a layout: `python -m lichen.runtime.layout_maker FILE SHA256 LAYOUT HOME`.

Tells its progress and at last its record as lines of JSON on standard output, and an error as one line on
standard error. It runs at the lowest priority, and computes with one thread, so that answers go first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from lichen.errors import LichenError
from lichen.quant.choice import plan_for, type_named
from lichen.quant.divergence import Tally, Vector
from lichen.quant.gguf import open_gguf
from lichen.quant.quantize import QuantizeProgress, quantize_file
from lichen.runtime.fingerprints import scratch_folder
from lichen.runtime.layouts import (
    LayoutProgress,
    LayoutRecord,
    complaint,
    divergence,
    find,
    keep_record,
    reference,
)
from lichen.runtime.measuring import PREFIX
from lichen.runtime.scoring import NativeScorer
from lichen.sync.store import ModelManifest, Store

TEXTS, LENGTH = 4, 64  # stretches that the model writes itself, and tokens of each
REPORT_S = 0.5

Tell = Callable[[LayoutProgress | LayoutRecord], None]


def make_layout(source: Path, model: str, layout: str, home: Path, tell: Tell) -> LayoutRecord:
    """Make it, measure it, keep it. Blocks. Raises what writing, checking and scoring raise.

    Where the file is here and only its record was lost, the record is made again.
    """
    present = find(home, model, layout)
    if present is not None and (known := _known(home, model, layout, present[0].sha256)) is not None:
        return known
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=scratch_folder(home)) as folder:
        staged = Path(folder) / f"{layout}.gguf" if present is None else present[1]
        if present is None:
            _write(source, model, layout, staged, tell)
        kl, positions = measure_divergence(source, staged, tell)
        manifest = present[0] if present else _adopt(source, model, layout, home, staged)
    record = LayoutRecord(model=model, layout=layout, sha256=manifest.sha256, kl=kl, positions=positions)
    keep_record(home, record)
    return record


def _known(home: Path, model: str, layout: str, sha256: str) -> LayoutRecord | None:
    path = home / "layouts" / f"{model[:16]}-{layout}.json"
    divergence(home, model)  # removes a record that cannot be read
    if not path.is_file():
        return None
    record = msgspec.json.decode(path.read_bytes(), type=LayoutRecord)
    return record if record.sha256 == sha256 else None


def _write(source: Path, model: str, layout: str, target: Path, tell: Tell) -> None:
    last = 0.0

    def report(now: QuantizeProgress) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_S:
            last = time.monotonic()
            tell(LayoutProgress("writing", now.bytes_done / max(1, now.bytes)))

    with open_gguf(source) as file:
        types = plan_for(file.tensors.values(), type_named(layout)).types
        lineage = {"lichen.source.sha256": model, "lichen.source.file": source.name}
        quantize_file(file, target, types, lineage=lineage, threads=1, progress=report)


def _adopt(source: Path, model: str, layout: str, home: Path, staged: Path) -> ModelManifest:
    store = Store(home / "store", offline=True)
    known = next((manifest.name for manifest in store.manifests() if manifest.sha256 == model), source.stem)
    return store.adopt(staged, source=reference(model, layout), file_name=f"{known}-{layout}.gguf")


def measure_divergence(source: Path, other: Path, tell: Tell) -> tuple[float, int]:
    """Mean KL in nats of another file's predictions from a file's, and over how many positions.

    The text is what the file's model writes by itself, drawn by its own probabilities from a fixed seed.
    """
    chance = np.random.default_rng(1)
    first, second = (NativeScorer(path, window=LENGTH, threads=1) for path in (source, other))
    tally = Tally()
    try:
        for number in range(TEXTS):
            tell(LayoutProgress("measuring", number / TEXTS))
            text = [int(chance.integers(first.model.vocab_size))]
            while len(text) < LENGTH:
                text.append(_drawn(first.next_logits(text), chance))
            tally.add(second.logits(text)[:-1], text[1:], first.logits(text)[:-1])
    finally:
        first.close()
        second.close()
    return float(np.mean(tally.kls)), len(tally.kls)


def _drawn(logits: Vector, chance: np.random.Generator) -> int:
    """A token by its probability; logits [vocabulary]."""
    scores = logits.astype(np.float64)
    weights = np.exp(scores - scores.max())
    return int(chance.choice(len(weights), p=weights / weights.sum()))


def main() -> None:
    """See the module."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.nice(19)
    source, model, layout, home = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])

    def tell(now: LayoutProgress | LayoutRecord) -> None:
        print(msgspec.json.encode(now).decode(), flush=True)

    async def run() -> None:
        async with Store(home / "store", offline=True).locked(reference(model, layout)):
            tell(await asyncio.to_thread(make_layout, source, model, layout, home, tell))

    try:
        asyncio.run(run())
    except LichenError as error:
        print(complaint(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
