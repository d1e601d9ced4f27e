"""Values of a GGUF's metadata with the types that the file gives them, decoded and encoded.

A value keeps its type, so that a file that is written again says the same as before, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from lichen.errors import ModelFileError
from lichen.quant.formats import SCALARS, ValueType
from lichen.quant.gguf_header import ArraySpan, Bytes, HeaderValue, array_items

# The item types of arrays that numpy can hold, little endian as in the file.
_DTYPES: dict[ValueType, np.dtype[Any]] = {
    kind: np.dtype(np.bool_ if kind is ValueType.BOOL else form) for kind, form in SCALARS.items()
}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}


class Value(msgspec.Struct, frozen=True, eq=False):
    """One value. content: what Python has for the type.

    bool, int, float and str for plain types; bytes of a text that are not UTF-8 are lone surrogates
    (PEP 383). Of an ARRAY: a read-only numpy array of numbers or bools (a tuple will do for writing), a
    tuple of texts, or a tuple of `Value`s for arrays in an array; `item_type` says which.
    """

    type: ValueType
    content: Any
    item_type: ValueType | None = None

    @classmethod
    def of(cls, content: Any) -> Value:
        """The value with the type that llama.cpp's own files use for such a content.

        Whole numbers become UINT32, or INT32 below zero, and 64 bits only where they must; fractions
        FLOAT32. Lists become arrays, of the widest type that an item needs; numpy arrays keep their type.
        Raises ModelFileError for anything else.
        """
        if isinstance(content, Value):
            return content
        if isinstance(content, np.generic) and content.dtype.newbyteorder("<") in _KINDS:
            return cls(_KINDS[content.dtype.newbyteorder("<")], content.item())
        if isinstance(content, bool | int | float | str):
            return cls(_plain_type([content]), content)
        if isinstance(content, np.ndarray) and content.ndim == 1:
            kind = _KINDS.get(content.dtype.newbyteorder("<"))
            if kind is not None:
                return cls(ValueType.ARRAY, content.astype(_DTYPES[kind], copy=False), kind)
        if isinstance(content, list | tuple) and content:
            if all(isinstance(item, list | tuple | np.ndarray) for item in content):
                return cls(ValueType.ARRAY, tuple(cls.of(item) for item in content), ValueType.ARRAY)
            kind = _plain_type(content)
            return cls(ValueType.ARRAY, tuple(content), kind)
        raise ModelFileError(
            f"{content.__class__.__name__} is no type that the metadata of a GGUF can hold.",
            hint="Give an empty array its item type with Value(ValueType.ARRAY, (), ...).",
        )


def _plain_type(items: list[Any] | tuple[Any, ...]) -> ValueType:
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return ValueType.BOOL
    if kinds == {str}:
        return ValueType.STRING
    if kinds == {int}:
        low, high = min(items), max(items)
        if low < 0:
            return ValueType.INT32 if low >= -(1 << 31) and high < 1 << 31 else ValueType.INT64
        return ValueType.UINT32 if high < 1 << 32 else ValueType.UINT64
    if kinds <= {int, float}:
        return ValueType.FLOAT32
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ModelFileError(f"An array of {names} is no array that a GGUF can hold: its items need one type.")


class Metadata(Mapping[str, Value]):
    """The metadata of an open file; an array is decoded when it is asked for, and then kept."""

    def __init__(self, data: Bytes, values: Mapping[str, HeaderValue]) -> None:
        self._data, self._values = data, values
        self._decoded: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._decoded:
            value = self._values[key]
            self._decoded[key] = decode(self._data, value)
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def decode(data: Bytes, value: HeaderValue) -> Value:
    """The value of a checked header over its file. Numbers of an array are not copied.

    Raises ModelFileError for a bool that is neither true nor false.
    """
    span = value.content
    if not isinstance(span, ArraySpan):
        return Value(value.type, span)
    if span.item_type is ValueType.STRING:
        return Value(ValueType.ARRAY, tuple(array_items(data, span)), span.item_type)
    if span.item_type is ValueType.ARRAY:
        inner = (HeaderValue(ValueType.ARRAY, item) for item in array_items(data, span))
        return Value(ValueType.ARRAY, tuple(decode(data, item) for item in inner), span.item_type)
    dtype = _DTYPES[span.item_type]
    if span.item_type is ValueType.BOOL:
        flags = np.frombuffer(data, np.uint8, span.length, span.start)
        if (flags > 1).any():
            raise ModelFileError("An array of bools holds numbers other than 0 and 1.")
        return Value(ValueType.ARRAY, flags.view(np.bool_), span.item_type)
    return Value(ValueType.ARRAY, np.frombuffer(data, dtype, span.length, span.start), span.item_type)


def encode(value: Value, key: str) -> bytes:
    """The value as it stands in a file, behind its type. Raises ModelFileError when it does not fit it."""
    content = value.content
    try:
        if value.type is ValueType.STRING:
            return text(content)
        if value.type is ValueType.ARRAY:
            if value.item_type is None:
                raise ModelFileError(f"The array {key} has no item type.")
            return struct.pack("<IQ", value.item_type, len(content)) + _items(value, key)
        if value.type is ValueType.BOOL and not isinstance(content, bool):
            raise TypeError
        return struct.pack(SCALARS[value.type], content)
    except (struct.error, TypeError, AttributeError, OverflowError, ValueError):
        shown = repr(content)
        raise ModelFileError(
            f"{key} cannot be {value.type.name}: it is {shown if len(shown) < 60 else shown[:60] + '…'}."
        ) from None


def _items(value: Value, key: str) -> bytes:
    kind = value.item_type
    if kind is ValueType.STRING:
        return b"".join(map(text, value.content))
    if kind is ValueType.ARRAY:
        return b"".join(encode(item, key) for item in value.content)
    assert kind is not None
    if not isinstance(value.content, np.ndarray):
        return struct.pack(f"<{len(value.content)}{SCALARS[kind][1:]}", *value.content)
    return value.content.astype(_DTYPES[kind], casting="safe", copy=False).tobytes()


def text(content: str) -> bytes:
    """A text as it stands in a file: its length in bytes, then they."""
    data = content.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
