"""Measures a model on the real kernels: cut to a few layers, in a wanted layout, in a scratch folder.

Steps of the two lengths take turns, so that each finds the processor's caches as a step of the whole model
does: full of something else. Not covered: models so small that they stay in the caches as a whole.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from lichen.devices.fingerprint import CHUNKS, DEPTH, PAIRED, WIDTHS, Sample, Shape, Task
from lichen.errors import EngineError
from lichen.quant.choice import stored_bytes
from lichen.quant.cut import layer_bytes, layer_count, types_of, write_cut
from lichen.quant.gguf import GGUFFile, open_gguf
from lichen.quant.quantize import planned_bytes
from lichen.runtime import heap, memory, native

PREFIX = "measuring-"  # of scratch folders
SOURCE = "source"  # the layout of the file as it is
SHORT, LONG = 2, 10  # layers of the two lengths
LONG_BYTES = 400_000_000  # that the layers of the long one take at most, where four layers take less
SAMPLE_S = 0.1  # that the steps of one sample take together, at least
MOST_STEPS = 8  # of one sample
PAUSE_S = 0.0005  # before a step: the engine draws and delivers there, and other threads go to sleep

_CELLS = 256  # llama.cpp rounds the cells of a sequence up to a multiple of this
_STRIDE = 7919  # a prime, so that the tokens of a batch differ: experts are chosen by them
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def lengths(whole: int, bytes_a_layer: int) -> tuple[int, ...]:
    """How many layers to measure of a model with `whole` layers; one number where there is only one."""
    affordable = max(SHORT + 2, LONG_BYTES // max(1, bytes_a_layer))
    long = min(LONG, whole, affordable)
    return (min(SHORT, long - 1), long) if long > 1 else (long,)


class NativeBench:
    """Two lengths of one layout of a model; a context manager that removes its scratch files.

    layout: `SOURCE`, or the name of a type such as q8_0. scratch: a folder with room for the long one, by
    default the system's. layers: other lengths than `lengths` chooses. Used by one thread. Raises
    ModelFileError, ConfigError, DiskFull, StoreError and EngineError, here and in `measure`.
    """

    def __init__(
        self,
        path: Path,
        layout: str = SOURCE,
        *,
        scratch: Path | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        self._layers = layers
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=scratch)
        self._cuts: list[_Cut] = []
        try:
            with open_gguf(path) as file:
                self.shape = self._write(file, None if layout == SOURCE else layout)
        except BaseException:
            self._folder.cleanup()
            raise

    def _write(self, file: GGUFFile, layout: str | None) -> Shape:
        types, whole = types_of(file, layout), layer_count(file)
        whole_bytes = layer_bytes(file, types, whole)
        layers = self._layers or lengths(whole, whole_bytes // whole)
        for count in layers:
            target = Path(self._folder.name) / f"{count}.gguf"
            write_cut(file, target, types, count)
            self._cuts.append(_Cut(target))
        total = unread = planned_bytes(file, types)
        if _OUTPUT in file.tensors and _EMBEDDING in file.tensors:  # else the embedding is the output, too
            unread = total - stored_bytes(file.tensors[_EMBEDDING], types[_EMBEDDING])
        return Shape(
            layers=layers,
            layer_bytes=tuple(layer_bytes(file, types, count) for count in layers),
            whole_layers=whole,
            whole_layer_bytes=whole_bytes,
            tensor_bytes=total,
            read_bytes=unread,
        )

    def measure(self, task: Task) -> Sample:
        """One sample: the median of some steps of each length, or bytes."""
        if task.kind == "load":
            return tuple(cut.load_seconds() for cut in self._cuts)
        if task.kind == "resident":
            self._cuts[0].resident_bytes()  # the first of a process does not count
            return tuple(cut.resident_bytes() for cut in self._cuts)
        if task.kind == "buffers":
            return tuple(cut.buffer_bytes(task.tokens) for cut in self._cuts)
        if task.kind == "cells":
            return tuple(cut.cell_bytes(task.kv) for cut in self._cuts)
        if task.kind in PAIRED:
            cut = self._cuts[-1 if task.kind == "alone" else 0]
            return in_turns(
                [cut.step(msgspec.structs.replace(task, depth=cells)) for cells in (0, task.depth)]
            )
        return in_turns([cut.step(task) for cut in self._cuts])

    def close(self) -> None:
        """Free the models and remove the files; idempotent."""
        for cut in self._cuts:
            cut.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_turns(steps: list[Callable[[], float]]) -> Sample:
    """The median of the seconds that each of the steps tells, taken in turns until the sample is long enough.

    Not the least: that is 15 to 20 % less than what steps take one after the other for minutes.
    """
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(MOST_STEPS):
        for seconds, step in zip(taken, steps, strict=True):
            seconds.append(step())
        if sum(map(sum, taken)) >= SAMPLE_S:
            break
    return tuple(map(statistics.median, taken))


class _Cut:
    """One length: its file, and the model and contexts that were made of it so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model: native.Model | None = None
        self._contexts: dict[str, native.Context] = {}

    @property
    def model(self) -> native.Model:
        """The model, loaded once."""
        if self._model is None:
            self._model = native.Model(self._path)
        return self._model

    def close(self) -> None:
        """Free all of it; idempotent."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        if self._model is not None:
            self._model.close()
            self._model = None

    def step(self, task: Task) -> Callable[[], float]:
        """A function that does what the task asks for once, and tells how many seconds that took."""
        kinds = {"chunk": self._chunk, "depth": self._depth, "alone": self._depth}
        work = kinds.get(task.kind, self._decoding)(task)
        context, slots = work.context, work.keep.keys()
        tokens = self._tokens(len(work.slots))

        def once() -> float:
            for slot in slots:
                context.truncate(slot, work.keep[slot])
            context.set_threads(task.threads)
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            _decode(context, tokens, work.positions, work.slots, work.outputs)
            context.logits(len(tokens) - 1)  # waits for a device that computes on its own
            return time.perf_counter() - started

        return once

    def _decoding(self, task: Task) -> _Work:
        """Sequences of one token each, with the next one of each of the first `tokens`."""
        context, count = self._contexts.get("decode"), task.tokens
        if context is None:
            most = WIDTHS[-1]
            size = native.ContextSize(context=_CELLS, slots=most, threads=1, batch=most, outputs=most)
            context = self._contexts["decode"] = native.Context(self.model, size)
            _decode(context, self._tokens(most), [0] * most, list(range(most)), [0] * most)
        outputs = [1] * count if task.kind == "decode" else [0] * (count - 1) + [1]
        slots = list(range(count))
        return _Work(context, dict.fromkeys(slots, 1), [1] * count, slots, outputs)

    def _chunk(self, task: Task) -> _Work:
        """The beginning of a prompt."""
        context, count = self._contexts.get("chunk"), task.tokens
        if context is None:
            size = native.ContextSize(context=CHUNKS[-1] + _CELLS, slots=1, threads=1, batch=CHUNKS[-1])
            context = self._contexts["chunk"] = native.Context(self.model, size)
            warm = CHUNKS[0]  # what the first batch of a context allocates is no cost of a step
            _decode(context, self._tokens(warm), list(range(warm)), [0] * warm, [0] * warm)
        return _Work(context, {0: 0}, list(range(count)), [0] * count, [0] * (count - 1) + [1])

    def _depth(self, task: Task) -> _Work:
        """Tokens of a sequence that holds so many already, or none."""
        name, slot = f"depth {task.kv}", 1 if task.depth else 0
        context = self._contexts.get(name)
        if context is None:
            room = DEPTH + _CELLS
            size = native.ContextSize(context=room, slots=2, threads=1, batch=CHUNKS[-1], kv=task.kv)
            context = self._contexts[name] = native.Context(self.model, size)
        if context.cells(slot) < task.depth:
            context.set_threads(task.threads)
            self._fill(context, slot, task.depth)
        count = task.tokens
        positions = list(range(task.depth, task.depth + count))
        return _Work(context, {slot: task.depth}, positions, [slot] * count, [0] * (count - 1) + [1])

    def _fill(self, context: native.Context, slot: int, depth: int) -> None:
        """Make a slot hold `depth` tokens."""
        context.clear(slot)
        for start in range(0, depth, CHUNKS[-1]):
            count = min(CHUNKS[-1], depth - start)
            positions = list(range(start, start + count))
            _decode(context, self._tokens(count), positions, [slot] * count, [0] * count)

    def _tokens(self, count: int) -> list[int]:
        return [index * _STRIDE % self.model.vocab_size for index in range(count)]

    # ---- sizes, and loading -----------------------------------------------------------------------

    def load_seconds(self) -> float:
        """Seconds from the file, which is in memory already, to a context that could decode."""
        started = time.perf_counter()
        model = native.Model(self._path)
        native.Context(model, native.ContextSize(context=_CELLS, slots=1, threads=1)).close()
        seconds = time.perf_counter() - started
        model.close()
        return seconds

    def resident_bytes(self) -> float:
        """By how much loading the model makes this process larger; 1 where it does not.

        A process's first load takes what it needs only once.
        """
        heap.trim()
        before = memory.resident()
        model = native.Model(self._path)
        grown = memory.resident() - before
        model.close()
        return float(max(1, grown))

    def buffer_bytes(self, tokens: int) -> float:
        """Bytes for the activations and logits of batches of so many tokens."""
        size = native.ContextSize(context=CHUNKS[-1] + _CELLS, slots=1, threads=1, batch=tokens)
        told = self._told(size)
        return float(told.get("compute", 0) + told.get("output", 0)) or _silent()

    def cell_bytes(self, kv: str) -> float:
        """Bytes of one token in the KV cache."""
        size = native.ContextSize(context=DEPTH, slots=1, threads=1, batch=CHUNKS[0], kv=kv)
        return self._told(size).get("KV", 0) / size.context or _silent()

    def _told(self, size: native.ContextSize) -> dict[str, int]:
        context = native.Context(self.model, size)
        context.close()
        return context.buffers


@dataclass(frozen=True, slots=True)
class _Work:
    """A batch of a context, and how many tokens each of its slots must hold before it."""

    context: native.Context
    keep: dict[int, int]
    positions: list[int]
    slots: list[int]
    outputs: list[int]


def _decode(
    context: native.Context, tokens: list[int], positions: list[int], slots: list[int], outputs: list[int]
) -> None:
    code = context.decode(tokens, positions, slots, outputs)
    if code != native.DECODE_OK:
        raise EngineError(f"The model could not be measured: decoding failed with code {code}.")


def _silent() -> float:
    raise EngineError(
        f"llama.cpp {native.version()} does not tell the size of its buffers.",
        hint="Install a version of llama-cpp-python that lichen's constraints.txt names.",
    )
