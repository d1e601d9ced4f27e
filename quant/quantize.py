"""Writes a model again with other types of tensors, a piece of a tensor at a time.

Sources may be floats or quantized already. Memory is bounded by `PIECE`, whatever a tensor's size: a piece
of rows is dequantized, quantized, written and forgotten. The new file gets its name only when it is whole
(`gguf_write.py`); an error, or an exception out of `progress`, leaves nothing behind.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lichen.errors import ConfigError, DiskFull, ModelFileError, TensorError
from lichen.quant import ggml
from lichen.quant.choice import file_type, stored_bytes
from lichen.quant.formats import BLOCKS, GGMLType, row_bytes
from lichen.quant.gguf import GGUFFile, GGUFTensor, Value, ValueType, write_gguf
from lichen.quant.importance import Importance

PIECE = 1 << 23  # elements of a piece: 32 MB of float32
HEADER_ROOM = 1 << 12  # bytes that new metadata may add to a file's header

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeProgress:
    """How far a file is. bytes: written so far. seconds_left: None until it can be told."""

    tensor: str
    tensors_done: int
    tensors: int
    bytes_done: int
    bytes: int
    seconds_left: float | None


Report: TypeAlias = Callable[[QuantizeProgress], None]


def planned_bytes(file: GGUFFile, types: Mapping[str, GGMLType]) -> int:
    """Bytes of all tensors, with what aligns them to 32."""
    return sum(-(-stored_bytes(tensor, types[name]) // 32) * 32 for name, tensor in file.tensors.items())


def header_bytes(file: GGUFFile) -> int:
    """Bytes of a file that are no tensor's: a new file's header is about as long."""
    return sum(part.stat().st_size for part in file.parts) - sum(
        tensor.data.nbytes for tensor in file.tensors.values()
    )


def quantize_file(
    source: GGUFFile,
    target: Path,
    types: Mapping[str, GGMLType],
    *,
    importance: Importance | None = None,
    lineage: Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: Report | None = None,
) -> None:
    """Write `target` with each tensor as the type that `types` has under its name.

    Tensors whose type stays keep their bytes. Metadata is kept but for general.file_type and
    general.quantization_version; lineage is added to it. progress is called after each piece.
    Raises ConfigError when the target is the source, DiskFull before anything is written, TensorError and
    ModelFileError that name the tensor (numbers that do not fit, damaged rows), and what `write_gguf` does.
    """
    check_target(source, target)
    total = planned_bytes(source, types)
    needed, free = total + header_bytes(source) + HEADER_ROOM, shutil.disk_usage(target.parent).free
    if needed > free:
        raise DiskFull(str(target.parent), needed, free)
    work = _Work(source, types, importance, threads, progress, total)
    metadata = {
        **source.metadata,
        "general.file_type": Value(ValueType.UINT32, file_type(source.tensors.values(), types)),
        "general.quantization_version": Value(ValueType.UINT32, QUANTIZATION_VERSION),
        **(lineage or {}),
    }
    write_gguf(
        target,
        metadata,
        [
            (tensor.name, types[tensor.name], tensor.shape, lambda tensor=tensor: work.pieces(tensor))
            for tensor in source.tensors.values()
        ],
    )


def check_target(source: GGUFFile, target: Path) -> None:
    """Raises ConfigError when a file cannot be made there: no folder, or the source itself."""
    if any(target.exists() and part.samefile(target) for part in source.parts):
        raise ConfigError(f"{target} is the source itself.", hint="Give the new file another name.")
    if not target.parent.is_dir():
        raise ConfigError(f"There is no folder {target.parent}.", hint="Make it first.")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder.", hint="Give the name of the file to write.")


class _Work:
    """The state of one run."""

    def __init__(
        self,
        source: GGUFFile,
        types: Mapping[str, GGMLType],
        importance: Importance | None,
        threads: int | None,
        progress: Report | None,
        total: int,
    ) -> None:
        self._types, self._importance, self._threads = types, importance, threads
        self._progress, self._total, self._tensors = progress, total, len(source.tensors)
        self._tensors_done = self._bytes_done = 0
        self._started = time.monotonic()

    def pieces(self, tensor: GGUFTensor) -> Iterator[npt.NDArray[np.uint8]]:
        """The new bytes of a tensor, a piece at a time."""
        kind = self._types[tensor.name]
        try:
            for piece in stored_pieces(tensor, kind, self._importance, self._threads):
                yield piece
                self._bytes_done += piece.nbytes
                self._tell(tensor.name)
        except (TensorError, ModelFileError) as error:
            raise type(error)(
                f"{tensor.name} cannot be written as {kind.name}: {error.message}", hint=error.hint
            ) from error
        self._tensors_done += 1
        self._tell(tensor.name)

    def _tell(self, name: str) -> None:
        if self._progress is None:
            return
        seconds, done = time.monotonic() - self._started, self._bytes_done
        left = seconds * (self._total - done) / done if done and seconds > 1 else None
        self._progress(
            QuantizeProgress(
                tensor=name,
                tensors_done=self._tensors_done,
                tensors=self._tensors,
                bytes_done=done,
                bytes=self._total,
                seconds_left=left,
            )
        )


def stored_pieces(
    tensor: GGUFTensor, kind: GGMLType, importance: Importance | None, threads: int | None = None
) -> Iterator[npt.NDArray[np.uint8]]:
    """A tensor's rows as another type, uint8 [rows, row_bytes], at most `PIECE` elements at a time.

    Raises TensorError when its numbers do not fit, and ModelFileError when the stored ones are damaged.
    """
    columns, matrix = tensor.shape[-1], tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, PIECE // columns)
    for start in range(0, len(tensor.data), matrix):  # experts lie one after the other
        weights = importance.of(tensor, start) if importance is not None else None
        for first in range(start, start + matrix, step):
            rows = tensor.data[first : min(first + step, start + matrix)]
            if kind == tensor.type:
                yield np.ascontiguousarray(rows)
                continue
            numbers = read_rows(tensor, rows, threads)
            out = np.empty((len(rows), row_bytes(kind, columns)), np.uint8)
            ggml.quantize(kind, numbers, out, weights if BLOCKS[kind][0] > 1 else None, threads)
            yield out


def read_rows(
    tensor: GGUFTensor, rows: npt.NDArray[np.uint8], threads: int | None = None
) -> npt.NDArray[np.float32]:
    """Stored rows of a tensor as float32 [rows, columns]. Raises ModelFileError for damaged ones."""
    ggml.check_rows(tensor.type, rows, threads)
    numbers = np.empty((len(rows), tensor.shape[-1]), np.float32)
    ggml.dequantize(tensor.type, rows, numbers, threads)
    return numbers


def requantized(
    tensor: GGUFTensor, kind: GGMLType, importance: Importance | None = None, threads: int | None = None
) -> GGUFTensor:
    """The tensor as another type, in memory. Raises as `stored_pieces` does."""
    pieces = list(stored_pieces(tensor, kind, importance, threads))
    data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return GGUFTensor(tensor.name, kind, tensor.shape, data)
