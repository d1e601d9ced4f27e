"""Writes GGUF 3 in one stream, and gives the file its name only when it is whole and sound."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from lichen.durable import sync_folder
from lichen.errors import DiskFull, LichenError, ModelFileError, StoreError
from lichen.quant.formats import GGMLType, ValueType, row_bytes, tensor_type
from lichen.quant.gguf_header import ALIGNMENTS, read_header
from lichen.quant.gguf_values import Value, encode, text

# name, type, shape (rows first), bytes of all rows one after the other: a buffer, or (in a list) a function
# that gives them as buffers, piece by piece
TensorItem: TypeAlias = tuple[str, GGMLType, tuple[int, ...], Any]

_Entry: TypeAlias = tuple[str, GGMLType, tuple[int, ...], int]  # the same, but the number of bytes

_COPY = 1 << 20  # bytes at a time from the spool into the file


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorItem],
    *,
    alignment: int | None = None,
) -> None:
    """Write a file of version 3, in the order of the arguments; replaces what has the name.

    metadata: `Value`s, or plain Python values that become what `Value.of` says. tensors: name, type, shape
    (rows first) and any contiguous buffer of the rows' bytes. A list is written in one pass, and may hold
    functions in place of buffers, called in turn for pieces of the rows that are never held together. An
    iterator is taken one tensor at a time, so that they need never be in memory together; since the header,
    with all shapes, comes first in the file, their bytes wait on the disk beside it. alignment: in bytes;
    None for what `general.alignment` says, else 32.
    Raises ModelFileError when the file would not be sound, TensorError for rows that are no whole blocks,
    DiskFull, and StoreError when it cannot be written.
    """
    path = Path(path)
    values = {key: Value.of(content) for key, content in metadata.items()}
    alignment = settled_alignment(values, alignment)
    with _replacing(path) as file:
        if isinstance(tensors, Sequence):
            _write_header(file, values, [_entry(tensor) for tensor in tensors], alignment)
            for tensor in tensors:
                _write_rows(file, tensor, alignment)
            return
        with tempfile.TemporaryFile(dir=path.parent) as spool:
            entries = []
            for tensor in tensors:
                entries.append(_entry(tensor))
                _write_rows(spool, tensor, alignment)
            _write_header(file, values, entries, alignment)
            spool.seek(0)
            shutil.copyfileobj(spool, file, _COPY)


def padded_bytes(tensor: TensorItem, alignment: int) -> int:
    """Bytes that a tensor takes in a file. Raises as `write_gguf` does."""
    return -(-_entry(tensor)[3] // alignment) * alignment


def _entry(tensor: TensorItem) -> _Entry:
    name, number, shape, data = tensor
    kind = tensor_type(number)
    if not 1 <= len(shape) <= 4 or min(shape) < 1:
        raise ModelFileError(f"Tensor {name} has the shape {list(shape)}, but 1 to 4 dimensions are allowed.")
    size = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
    if not callable(data):  # of a function it shows when it is written
        with _bytes_of(name, data) as view:
            _refuse_size(name, kind, shape, size, view.nbytes)
    return name, kind, tuple(shape), size


def _refuse_size(name: str, kind: GGMLType, shape: tuple[int, ...], size: int, given: int) -> None:
    if given != size:
        raise ModelFileError(
            f"Tensor {name} of the shape {list(shape)} takes {size} bytes as {kind.name}, "
            f"but {given} were given."
        )


def _bytes_of(name: str, data: Any) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except (TypeError, ValueError, BufferError):
        raise ModelFileError(f"The bytes of tensor {name} are no contiguous buffer.") from None


def settled_alignment(values: dict[str, Value], alignment: int | None) -> int:
    """The alignment, said in the metadata too where it is not the usual one. Raises ModelFileError."""
    told = values.get("general.alignment")
    wanted = alignment or (told.content if told is not None else 32)
    if wanted not in ALIGNMENTS:
        raise ModelFileError(f"The alignment is {wanted!r}, not a power of two from 8 to 65536.")
    if told is not None or wanted != 32:
        values["general.alignment"] = Value(ValueType.UINT32, wanted)
    return int(wanted)


def _write_header(
    file: BinaryIO,
    values: Mapping[str, Value],
    entries: list[_Entry],
    alignment: int,
) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(values)))
    for key, value in values.items():
        file.write(text(key) + struct.pack("<I", value.type) + encode(value, key))
    offset = 0
    for name, kind, shape, size in entries:
        file.write(text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        file.write(struct.pack("<IQ", kind, offset))
        offset += -(-size // alignment) * alignment
    file.write(bytes(-file.tell() % alignment))


def _write_rows(file: BinaryIO, tensor: TensorItem, alignment: int) -> None:
    name, kind, shape, data = tensor
    written = 0
    for piece in _pieces(data):
        with _bytes_of(name, piece) as view:
            file.write(view)
            written += view.nbytes
    _refuse_size(name, kind, shape, math.prod(shape[:-1]) * row_bytes(kind, shape[-1]), written)
    file.write(bytes(-written % alignment))


def _pieces(data: Any) -> Iterable[Any]:
    give: Callable[[], Iterable[Any]] | None = data if callable(data) else None
    return (data,) if give is None else give()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside the path, which takes its place when the block ends well and the file is sound."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check(partial, path.name)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, partial, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _check(partial: Path, name: str) -> None:
    """Raises ModelFileError for what any reader of the file would refuse, such as a name given twice."""
    with partial.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        read_header(data, name)


def _disk_error(path: Path, partial: Path, error: OSError) -> LichenError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        written = partial.stat().st_size if partial.exists() else 0
        return DiskFull(str(path.parent), written, shutil.disk_usage(path.parent).free)
    return StoreError(f"{path} cannot be written: {error.strerror}.")
