"""Measurements of a few layers of a model, and the fingerprint of the whole one that follows from them.

A model is measured cut to two lengths (`quant/cut.py`). What a layer costs is the difference, what comes
once (embedding, output, start-up) is the rest, and the whole model follows on a straight line over the
bytes of its layers. A `Task` is one thing to measure, a sample its value for each of the lengths, in
seconds or bytes; a `Record` keeps all samples, so that an interrupted fingerprint goes on where it was.

A sample is the median of some steps, and of several samples the median counts for each length: answers
take what steps take in the mean, not in a lucky moment. What cells of the KV cache add is told by two steps
in turn, without them and with them. Small micro-measurements in place of whole profiles follow iServe (arXiv
2501.13111). Not covered: layers of different kinds, of which the first ones stand for the rest.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from lichen.devices.curves import Curve, Fingerprint, KVCost, ThreadCurve
from lichen.errors import ConfigError

VERSION = 3  # of a record; a change makes all that was measured unknown
WIDTHS = (1, 2, 4, 8, 16)  # sequences that decode one token each
CHUNKS = (32, 256)  # tokens of a prompt
FEW_WIDTHS, FEW_CHUNKS = (1, 4, 16), (256,)  # with fewer threads than all
DEPTH = 1024  # cells that a prompt's sequence holds already, and half of it where one token is decoded
PROBE = 128  # tokens of a prompt behind so many cells: few of them share little of what they read
KV_TYPES = ("f16", "q8_0")
BUFFERS = (16, 128, 512)  # tokens of a batch, for the size of buffers

_LONG = 256  # tokens of a batch

Kind: TypeAlias = Literal["decode", "row", "chunk", "depth", "alone", "load", "resident", "buffers", "cells"]
Sample: TypeAlias = tuple[float, ...]  # a value for each length, in ascending order; of PAIRED see Task

PAIRED: tuple[Kind, ...] = ("depth", "alone")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to measure.

    decode    seconds of a step of `tokens` sequences, with logits for each
    row       the same with logits for one only
    chunk     seconds of `tokens` tokens of one prompt that nothing comes before, with logits for the last
    depth     seconds of `tokens` tokens of one prompt behind no and behind `depth` cells, of the short length
    alone     the same of the next token of one sequence, of the long length; for the first type of cache
    load      seconds until the model can be used
    resident  bytes that loading the model adds to this process
    buffers   bytes for computing batches of `tokens` tokens
    cells     bytes of the KV cache for one token
    """

    kind: Kind
    threads: int = 1
    tokens: int = 1
    depth: int = 0
    kv: str = "f16"

    @property
    def key(self) -> str:
        """Its name in a record."""
        return f"{self.kind} threads={self.threads} tokens={self.tokens} depth={self.depth} kv={self.kv}"

    def samples(self, rounds: int) -> int:
        """How many are enough: sizes do not vary, how long loading takes matters little, and long steps vary
        less than short ones."""
        if self.kind in ("load", "resident", "buffers", "cells"):
            return 1
        return min(rounds, 2) if self.tokens >= _LONG else rounds

    @property
    def shared(self) -> bool:
        """Whether it is the same for all layouts of a model: how its weights are stored does not matter."""
        return self.kind in (*PAIRED, "cells")


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The lengths that are measured and the whole, as layers and as bytes of layers.

    tensor_bytes: of all weights. read_bytes: of those that a step reads (a table of embeddings is not).
    """

    layers: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    whole_layers: int
    whole_layer_bytes: int
    tensor_bytes: int
    read_bytes: int


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What measurements hold for: class of machines, sha256 of the model, layout, version of the bindings."""

    hardware: str
    model: str
    layout: str
    library: str


class Record(msgspec.Struct, kw_only=True):
    """All samples so far, by the key of their task."""

    version: int = VERSION
    key: Key
    shape: Shape
    samples: dict[str, list[Sample]] = {}

    def count(self, task: Task) -> int:
        """Samples of a task."""
        return len(self.samples.get(task.key, ()))

    def add(self, task: Task, sample: Sample) -> None:
        """Keep one more. Raises ConfigError for values that no measurement gives."""
        if not sound(sample, values(task.key, self.shape)):
            raise ConfigError(f"Measuring {task.key} gave {sample}, which cannot be.")
        self.samples.setdefault(task.key, []).append(sample)

    def whole(self, task: Task) -> float | None:
        """The value for the whole model, of PAIRED what cells add to the one length that was measured; None
        if the task was not measured."""
        samples = self.samples.get(task.key)
        if not samples:
            return None
        if task.kind in PAIRED:
            return max(0.0, statistics.median(far - near for near, far in samples))
        return extrapolate(self.shape, typical(samples))


class Bench(Protocol):
    """What measures: a model cut to the lengths of `shape`, on this machine."""

    @property
    def shape(self) -> Shape: ...

    def measure(self, task: Task) -> Sample:
        """One sample. Raises LichenError."""


def values(key: str, shape: Shape) -> int:
    """How many values a sample of the task with this key has."""
    return 2 if key.startswith(tuple(f"{kind} " for kind in PAIRED)) else len(shape.layers)


def sound(sample: Sequence[float], lengths: int) -> bool:
    """Whether values can have been measured."""
    return len(sample) == lengths and all(math.isfinite(value) and 0 < value < 1e15 for value in sample)


def typical(samples: Sequence[Sample]) -> Sample:
    """For each length the median of its samples."""
    return tuple(map(statistics.median, zip(*samples, strict=True)))


def extrapolate(shape: Shape, sample: Sample) -> float:
    """The value for the whole model, on the least-squares line over the bytes of layers.

    A line that falls is taken for flat: no layer gives time or memory back.
    """
    if len(sample) == 1:
        return sample[0]
    slope, start = statistics.linear_regression(shape.layer_bytes, sample)
    return statistics.fmean(sample) if slope < 0 else start + slope * shape.whole_layer_bytes


def thread_counts(threads: int) -> tuple[int, ...]:
    """Powers of two below `threads`, and itself."""
    powers = itertools.takewhile(lambda count: count < threads, (1 << n for n in range(20)))
    return (*powers, max(1, threads))


def tasks(threads: int, *, kv_types: Sequence[str] = KV_TYPES, depth: int = DEPTH) -> list[Task]:
    """All that a fingerprint needs, what matters most first. threads: the most that are worth while."""
    counts = thread_counts(threads)[::-1]
    found = [Task(kind="load"), Task(kind="resident"), *(Task(kind="buffers", tokens=n) for n in BUFFERS)]
    for count in counts:
        widths, chunks = (WIDTHS, CHUNKS) if count == counts[0] else (FEW_WIDTHS, FEW_CHUNKS)
        found += [Task(kind="decode", threads=count, tokens=n) for n in widths]
        found += [Task(kind="row", threads=count, tokens=widths[-1])]
        found += [Task(kind="chunk", threads=count, tokens=n) for n in chunks]
    ends = (counts[0], counts[-1]) if len(counts) > 1 else counts
    for kind in kv_types:
        found.append(Task(kind="cells", kv=kind))
        found += [Task(kind="depth", threads=n, tokens=PROBE, depth=depth, kv=kind) for n in ends]
    found += [Task(kind="alone", threads=n, depth=depth // 2, kv=kv_types[0]) for n in ends]
    return found


# ---- from measurements to curves ------------------------------------------------------------------


def fingerprint(record: Record, wanted: Sequence[Task]) -> Fingerprint | None:
    """The curves of the whole model; None while something of `wanted` was not measured at all."""
    values = {task: record.whole(task) for task in wanted}
    if any(value is None for value in values.values()):
        return None
    known = {task: value for task, value in values.items() if value is not None}
    caches = tuple(
        _kv_cost(record.shape, known, kind)
        for kind in sorted({task.kv for task in known if task.kind == "cells"})
    )
    f16 = min(caches, key=lambda cost: cost.type != "f16")  # what steps were measured with
    counts = sorted({task.threads for task in known if task.kind == "decode"})
    curves = tuple(_thread_curve(known, count, f16.read.at(count)) for count in counts)
    resident, shape = known[Task(kind="resident")], record.shape
    weight_bytes, fixed_bytes = _memory(record, resident)
    return Fingerprint(
        hardware=record.key.hardware,
        model=record.key.model,
        layout=record.key.layout,
        library=record.key.library,
        threads=curves,
        kv=caches,
        compute=Curve(tuple((float(n), known[Task(kind="buffers", tokens=n)]) for n in BUFFERS)),
        weight_bytes=weight_bytes,
        fixed_bytes=fixed_bytes,
        load_seconds=known[Task(kind="load")],
        bandwidth=shape.read_bytes / curves[-1].batch.at(1),
    )


def _thread_curve(known: dict[Task, float], threads: int, read: float) -> ThreadCurve:
    """Points of batches: decoding steps without their further rows, chunks without what they attend to."""
    own = {task: seconds for task, seconds in known.items() if task.threads == threads}
    steps = {task.tokens: seconds for task, seconds in own.items() if task.kind == "decode"}
    (lone,) = (task for task in own if task.kind == "row")
    row = max(0.0, steps[lone.tokens] - own[lone]) / (lone.tokens - 1)
    points = {n: seconds - (n - 1) * row for n, seconds in steps.items()}
    for task, seconds in own.items():
        if task.kind == "chunk":
            attended = task.tokens * (task.tokens + 1) / 2  # token i attends to itself and the i before it
            points[task.tokens] = seconds - attended * read
    batch = Curve(tuple((float(n), max(0.0, seconds)) for n, seconds in sorted(points.items())))
    return ThreadCurve(threads=threads, batch=batch, output_row=row)


def _kv_cost(shape: Shape, known: dict[Task, float], kind: str) -> KVCost:
    """Seconds of a cell by threads, for the tokens of a prompt and for one that is decoded.

    The second was measured for one type, and is taken for others to be as much more as the first.
    """
    short, long = (shape.whole_layers / count for count in (shape.layers[0], shape.layers[-1]))
    measured = next(task.kv for task in known if task.kind == "alone")
    read, like = (_cells(known, "depth", kv, short) for kv in (kind, measured))
    alone = _cells(known, "alone", measured, long)
    scaled = [
        (threads, seconds * (read.at(threads) / like.at(threads) if like.at(threads) else 1.0))
        for threads, seconds in alone.points
    ]
    cell_bytes = round(known[Task(kind="cells", kv=kind)])
    return KVCost(type=kind, cell_bytes=cell_bytes, read=read, alone=Curve(tuple(scaled)))


def _cells(known: dict[Task, float], wanted: Kind, kv: str, share: float) -> Curve:
    """Seconds of a cell and token by threads; `share`: of all layers to those that were measured."""
    found = [(task, added) for task, added in known.items() if (task.kind, task.kv) == (wanted, kv)]
    found.sort(key=lambda pair: pair[0].threads)
    return Curve(
        tuple((float(task.threads), share * added / task.depth / task.tokens) for task, added in found)
    )


def _memory(record: Record, resident: float) -> tuple[int, int]:
    """Bytes of weights, with the second copy of repacked ones, and of all else that loading adds."""
    shape = record.shape
    sample = typical(record.samples[Task(kind="resident").key])
    if len(sample) < 2:
        return shape.tensor_bytes, max(0, round(resident) - shape.tensor_bytes)
    slope, _ = statistics.linear_regression(shape.layer_bytes, sample)
    weight_bytes = max(shape.tensor_bytes, round(shape.tensor_bytes * slope))
    return weight_bytes, max(0, round(resident) - weight_bytes)
