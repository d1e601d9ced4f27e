"""Reads the header of a GGUF. Every count, length, offset and size is checked before it is believed.

The format is GGUF 2 and 3 (little endian) as specified in ggml's docs/gguf.md. `gguf_check.py` puts a
model's own rules on top of it, `gguf.py` the tensors' bytes.
Invariants: nothing outside the file is read; what is returned lies within it. Arrays of the metadata are
walked, so that their extent is known, but not decoded: a vocabulary is most of a header.
Not covered: what the metadata means, the values of the weights.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

from lichen.errors import ModelFileError
from lichen.quant.formats import BLOCKS, SCALARS, GGMLType, ValueType

MAX_METADATA = 1 << 16  # keys
MAX_TENSORS = 1 << 17
MAX_STRING = 1 << 24  # bytes
MAX_ARRAY = 1 << 24  # items
MAX_NAME = 63  # bytes; ggml keeps 64 with the closing zero
MAX_KEY = 65535  # bytes
MAX_NESTING = 4  # arrays within arrays; no file in use has any
ALIGNMENTS = frozenset(8 << n for n in range(14))

Bytes: TypeAlias = mmap.mmap | bytes


class ArraySpan(msgspec.Struct, frozen=True):
    """Where an array of the metadata lies. start, end: bytes of its items in the file."""

    item_type: ValueType
    length: int
    start: int
    end: int


class HeaderValue(msgspec.Struct, frozen=True):
    """A value of the metadata. Bytes of a text that are not UTF-8 are kept as lone surrogates (PEP 383)."""

    type: ValueType
    content: bool | int | float | str | ArraySpan


class TensorSpan(msgspec.Struct, frozen=True):
    """Where a tensor lies. shape: as in the file, columns first. start, size: bytes in the file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    start: int
    size: int


class Header(msgspec.Struct, frozen=True):
    """What a file says of itself. name: of the file. end: bytes of the header."""

    name: str
    version: int
    alignment: int
    metadata: dict[str, HeaderValue]
    tensors: tuple[TensorSpan, ...]
    end: int

    def wrong(self, what: str) -> ModelFileError:
        """The error that says what is wrong with this file."""
        return unsound(self.name, what, self.end)


def unsound(name: str, what: str, at: int) -> ModelFileError:
    """The error about the file `name`, near the byte `at`."""
    return ModelFileError(
        f"{name} is not a sound GGUF: {what} (near byte {at}).",
        hint="Download it again; if that does not help, the file was made wrong.",
    )


def read_header(data: Bytes, name: str) -> Header:
    """Check and read the header of a whole file. O(header); the weights are not read.

    Raises ModelFileError that names what is wrong and where.
    """
    if len(data) < 24:
        raise ModelFileError(f"{name} is not a GGUF: it has only {len(data)} bytes.")
    return _Reader(data, name).read()


def array_items(data: Bytes, span: ArraySpan) -> Iterator[Any]:
    """The items of an array, decoded one after the other. Arrays within it come as their own spans.

    data: the file that the span was found in. Raises ModelFileError for a bool that is neither.
    """
    reader = _Reader(data, "an array", at=span.start)
    for _ in range(span.length):
        yield reader.value(span.item_type, "an item")


class _Reader:
    """One pass over a header; `_at` never leaves the file."""

    def __init__(self, data: Bytes, name: str, at: int = 0) -> None:
        self._data, self._size, self._name, self._at = data, len(data), name, at

    def read(self) -> Header:
        if self._bytes(4, "magic") != b"GGUF":
            raise self._wrong("it does not begin with GGUF")
        version = self._scalar("<I", "version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise self._wrong(
                "it is big endian" if swapped in (1, 2, 3) else f"version {version} is not one of 2, 3"
            )
        tensor_count = self._count("number of tensors", MAX_TENSORS, least_bytes=24)
        key_count = self._count("number of metadata keys", MAX_METADATA, least_bytes=13)
        metadata: dict[str, HeaderValue] = {}
        for index in range(key_count):
            key = self._name_of(f"metadata key {index}", MAX_KEY)
            if not key or key in metadata:
                raise self._wrong(f"metadata key {key!r} is {'there twice' if key else 'empty'}")
            kind = self._value_type(key, "unknown")
            metadata[key] = HeaderValue(kind, self.value(kind, key))
        alignment = self._alignment(metadata)
        tensors = self._tensors(tensor_count, alignment)
        return Header(self._name, version, alignment, metadata, tensors, self._at)

    # ---- bytes ------------------------------------------------------------------------------------

    def _wrong(self, what: str) -> ModelFileError:
        return unsound(self._name, what, self._at)

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._wrong(f"the file ends within {what}")
        start, self._at = self._at, self._at + count
        return self._data[start : self._at]

    def _scalar(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form), what))[0]

    def _count(self, what: str, limit: int, *, least_bytes: int) -> int:
        count: int = self._scalar("<Q", what)
        if count > limit or count * least_bytes > self._size - self._at:
            raise self._wrong(f"the {what} is {count}, more than the file can hold")
        return count

    def _text(self, what: str, limit: int = MAX_STRING) -> bytes:
        length: int = self._scalar("<Q", f"length of {what}")
        if length > min(limit, self._size - self._at):
            raise self._wrong(f"{what} says it has {length} bytes")
        return self._bytes(length, what)

    def _name_of(self, what: str, limit: int) -> str:
        try:
            return self._text(what, limit).decode("utf-8")
        except UnicodeDecodeError:
            raise self._wrong(f"{what} is not UTF-8") from None

    # ---- metadata ---------------------------------------------------------------------------------

    def _value_type(self, key: str, adjective: str) -> ValueType:
        number = self._scalar("<I", f"type of {key}")
        try:
            return ValueType(number)
        except ValueError:
            raise self._wrong(f"{key} has the {adjective} type {number}") from None

    def value(self, kind: ValueType, key: str, depth: int = 0) -> Any:
        if kind is ValueType.STRING:
            return self._text(key).decode("utf-8", "surrogateescape")
        if kind is ValueType.ARRAY:
            return self._array(key, depth + 1)
        value = self._scalar(SCALARS[kind], key)
        if kind is ValueType.BOOL:
            if value > 1:
                raise self._wrong(f"{key} is {value}, but must be true or false")
            return bool(value)
        return value

    def _array(self, key: str, depth: int) -> ArraySpan:
        if depth > MAX_NESTING:
            raise self._wrong(f"{key} has arrays nested more than {MAX_NESTING} deep")
        kind = self._value_type(f"the array {key}", "unknown item")
        nested = kind in (ValueType.STRING, ValueType.ARRAY)
        width = {ValueType.STRING: 8, ValueType.ARRAY: 12}.get(kind) or struct.calcsize(SCALARS[kind])
        length = self._count(f"length of {key}", MAX_ARRAY, least_bytes=width)
        start = self._at
        if not nested:
            self._at += length * width  # `_count` saw that they are there
        for _ in range(length if nested else 0):
            if kind is ValueType.STRING:
                self._skip_text(key)
            else:
                self._array(key, depth + 1)
        return ArraySpan(kind, length, start, self._at)

    def _skip_text(self, key: str) -> None:
        if self._size - self._at < 8:
            raise self._wrong(f"the file ends within {key}")
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        self._at += 8
        if length > min(MAX_STRING, self._size - self._at):
            raise self._wrong(f"an item of {key} says it has {length} bytes")
        self._at += length

    def _alignment(self, metadata: dict[str, HeaderValue]) -> int:
        given = metadata.get("general.alignment")
        if given is None:
            return 32
        if given.type is not ValueType.UINT32 or given.content not in ALIGNMENTS:
            raise self._wrong(f"general.alignment is {given.content!r}, not a power of two from 8 to 65536")
        return int(given.content)

    # ---- tensors ----------------------------------------------------------------------------------

    def _tensors(self, count: int, alignment: int) -> tuple[TensorSpan, ...]:
        """The table of tensors, whose offsets are counted from where the table ends."""
        table = [self._tensor(index, alignment) for index in range(count)]
        if len({tensor.name for tensor in table}) < count:
            raise self._wrong("two tensors have the same name")
        base = -(-self._at // alignment) * alignment
        end = 0
        for tensor in sorted(table, key=lambda tensor: tensor.start):
            if tensor.start != end:
                fault = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
                raise self._wrong(f"tensor {tensor.name} {fault}")
            last = base + tensor.start + tensor.size
            if last > self._size:
                raise self._wrong(
                    f"tensor {tensor.name} ends at byte {last}, but the file has {self._size}: it is cut off"
                )
            end = -(-(tensor.start + tensor.size) // alignment) * alignment
        return tuple(
            TensorSpan(tensor.name, tensor.type, tensor.shape, base + tensor.start, tensor.size)
            for tensor in table
        )

    def _tensor(self, index: int, alignment: int) -> TensorSpan:
        name = self._name_of(f"name of tensor {index}", MAX_NAME)
        if not name:
            raise self._wrong(f"the name of tensor {index} is empty")
        dimensions = self._scalar("<I", f"dimensions of {name}")
        if not 1 <= dimensions <= 4:
            raise self._wrong(f"tensor {name} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self._scalar("<Q", f"shape of {name}") for _ in range(dimensions))
        number = self._scalar("<I", f"type of {name}")
        offset: int = self._scalar("<Q", f"offset of {name}")
        try:
            kind = GGMLType(number)
        except ValueError:
            raise self._wrong(f"tensor {name} has the unknown type {number}") from None
        block, block_bytes = BLOCKS[kind]
        elements = math.prod(shape)
        if min(shape) < 1 or elements >= 1 << 62:
            raise self._wrong(f"tensor {name} has the impossible shape {list(shape)}")
        if shape[0] % block:
            raise self._wrong(
                f"rows of {name} have {shape[0]} elements, no multiple of {kind.name}'s {block}"
            )
        if offset % alignment or offset > self._size:
            raise self._wrong(f"tensor {name} has the offset {offset}")
        return TensorSpan(name, kind, shape, offset, elements // block * block_bytes)
