"""Where a file is cut into chunks: the same bytes give the same cuts on every machine.

A GGUF is cut at the beginning of every tensor, and inside a tensor at fixed distances from its beginning that
are whole blocks of its type. Weights change in place, they are never shifted by a few bytes, so that a
rolling hash finds nothing there that fixed cuts do not; and a chunk that belongs to one place of one tensor
can be compared with the same place of an older version (see pieces.py). What lies before the tensors
(vocabulary, template) and every other file is cut by content: FastCDC with normalised chunking, as published
by Xia et al. (USENIX ATC 2016; the 2020 variant), so that an edit changes only the chunks that it touches.

Not covered: safetensors are cut by content like any other file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from lichen.errors import ModelFileError, StoreError
from lichen.quant.gguf_check import TensorPlace, tensor_places
from lichen.sync.extra import of_the_extra
from lichen.sync.recipe import MAX_CHUNK, MAX_CHUNKS

ROLLING_AVERAGE = 64 << 10  # bytes; what is cut by content is small beside the weights
TENSOR_CHUNK = 256 << 10  # bytes; of files up to MAX_CHUNKS / 4 times this, then twice as much, and so on


class Cut(msgspec.Struct, frozen=True):
    """A chunk to be: offset and length in bytes, its type's block (1: unknown), its place in a tensor."""

    offset: int
    length: int
    block: int = 1
    label: tuple[str, int] | None = None


def cut(path: Path) -> list[Cut]:
    """The cuts of a file, in order and without gaps. Blocks: reads the part that is cut by content.

    Raises StoreError for a file that cannot be read or is too large.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            return []
        try:
            tensors = tensor_places(path)
        except ModelFileError:
            tensors = []
        with path.open("rb") as file:
            cuts = list(_cuts(file, size, tensors))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    if len(cuts) > MAX_CHUNKS:
        raise StoreError(
            f"{path} would have {len(cuts)} chunks, but a recipe holds {MAX_CHUNKS}.",
            hint="Split it into several files.",
        )
    return cuts


def _cuts(file: BinaryIO, size: int, tensors: list[TensorPlace]) -> Iterator[Cut]:
    grain = _grain(size)
    at = 0
    for tensor in tensors:
        yield from _by_content(file, at, tensor.offset, grain)
        yield from _inside(tensor, grain)
        at = tensor.offset + tensor.size
    yield from _by_content(file, at, size, grain)


def _grain(size: int) -> int:
    """Bytes of a chunk within a tensor: 256 KiB, more for files so large that their recipe would be."""
    grain = TENSOR_CHUNK
    while size // grain > MAX_CHUNKS // 4 and grain < MAX_CHUNK:
        grain *= 2
    return grain


def _inside(tensor: TensorPlace, grain: int) -> Iterator[Cut]:
    step = grain // tensor.block * tensor.block
    for start in range(0, tensor.size, step):
        length = min(step, tensor.size - start)
        yield Cut(tensor.offset + start, length, tensor.block, (tensor.name, start))


def _by_content(file: BinaryIO, start: int, stop: int, grain: int) -> Iterator[Cut]:
    with of_the_extra():
        from pyfastcdc import FastCDC

    average = max(ROLLING_AVERAGE, grain // 4)
    if stop - start <= average // 4:  # such as the padding between two tensors
        if stop > start:
            yield Cut(start, stop - start)
        return
    cutter = FastCDC(average, min_size=average // 4, max_size=min(average * 4, MAX_CHUNK))
    for found in cutter.cut_stream(_Window(file, start, stop)):
        yield Cut(start + found.offset, found.length)


class _Window:
    """A part of a file as a stream, so that no more of it is in memory than one chunk."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self._file, self._left = file, stop - start
        file.seek(start)

    def readinto(self, buffer: memoryview) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)
