"""Is this file a sound GGUF? Every count, length, offset and size is checked before it is believed.

The native loader asserts where it should doubt, and an assertion ends the whole process, so no file
reaches it that has not passed here. The format is GGUF 2 and 3 (little endian) as specified in ggml's
docs/gguf.md. Beyond the format, the facts that llama.cpp takes for granted are checked: the shapes of
the embedding, the lengths of the vocabulary's arrays, the ranges of token ids.
Not covered: the values of the weights.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lichen.errors import ModelFileError

MAX_METADATA = 1 << 16  # keys
MAX_TENSORS = 1 << 17
MAX_STRING = 1 << 24  # bytes
MAX_ARRAY = 1 << 24  # items
MAX_NAME = 63  # bytes; ggml keeps 64 with the closing zero
SHOWN_ITEMS = 16  # longer arrays are summarised, except whole numbers that may be one a layer
MAX_LAYERS = 1024

# ggml type id -> (name, elements a block, bytes a block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})


_Found = TypeVar("_Found")


class GGUFArray(msgspec.Struct, frozen=True):
    """An array of the metadata: its item type (GGUF's number), length, and items if they are few."""

    item_type: int
    length: int
    items: tuple[Any, ...] | None


class GGUFSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a sound file says of itself.

    tensor_bytes: size of all weights. matrix_bytes: by type, of those that are multiplied with (an
    embedding only where it is the output matrix too).
    """

    architecture: str
    version: int
    tensor_count: int
    parameter_count: int
    tensor_bytes: int
    context_train: int
    metadata: dict[str, Any]
    matrix_bytes: dict[str, int]


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    type_name: str


class TensorPlace(msgspec.Struct, frozen=True):
    """Where a tensor lies: offset from the file's first byte, its size and that of a block, in bytes."""

    name: str
    offset: int
    size: int
    block: int


def check_gguf(path: Path) -> GGUFSummary:
    """Read the header of a GGUF and check it. O(header); the weights are not read.

    Raises ModelFileError that names what is wrong and where.
    """
    return _with_reader(path, lambda reader: reader.read())


def tensor_places(path: Path) -> list[TensorPlace]:
    """Where the tensors of any GGUF lie (a model's or an adapter's), in the order of their bytes.

    Only the format is checked, not what llama.cpp needs of a model. Raises ModelFileError.
    """
    return _with_reader(path, lambda reader: reader.places())


def _with_reader(path: Path, read: Callable[[_Reader], _Found]) -> _Found:
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file.")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise ModelFileError(f"{path.name} is not a GGUF: it has only {size} bytes.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read(_Reader(data, size, path.name))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error


class _Reader:
    """One pass over a header; `_at` never leaves the file."""

    def __init__(self, data: mmap.mmap | bytes, size: int, name: str) -> None:
        self._data, self._size, self._name, self._at = data, size, name, 0
        self._types: dict[str, int] = {}  # key -> GGUF type of its value
        self._data_start = 0  # where the first tensor begins

    def read(self) -> GGUFSummary:
        version, metadata, tensors = self._header()
        self._check_model(metadata, {tensor.name: tensor for tensor in tensors})
        architecture = str(metadata["general.architecture"])
        return GGUFSummary(
            architecture=architecture,
            version=version,
            tensor_count=len(tensors),
            parameter_count=sum(_product(tensor.shape) for tensor in tensors),
            tensor_bytes=sum(tensor.size for tensor in tensors),
            context_train=int(metadata.get(f"{architecture}.context_length", 0)),
            metadata=metadata,
            matrix_bytes=_matrix_bytes(tensors),
        )

    def places(self) -> list[TensorPlace]:
        _, _, tensors = self._header()
        blocks = {name: size for name, _, size in GGML_TYPES.values()}
        tensors.sort(key=lambda tensor: tensor.offset)
        return [
            TensorPlace(each.name, self._data_start + each.offset, each.size, blocks[each.type_name])
            for each in tensors
        ]

    def _header(self) -> tuple[int, dict[str, Any], list[_Tensor]]:
        """Version, metadata and tensors."""
        if self._bytes(4, "magic") != b"GGUF":
            raise self._wrong("it does not begin with GGUF")
        version: int = self._scalar("<I", "version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise self._wrong(
                "it is big endian" if swapped in (1, 2, 3) else f"version {version} is not one of 2, 3"
            )
        tensor_count = self._count("number of tensors", MAX_TENSORS, least_bytes=24)
        key_count = self._count("number of metadata keys", MAX_METADATA, least_bytes=13)
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = self._string(f"metadata key {index}", limit=65535)
            if not key or key in metadata:
                raise self._wrong(f"metadata key {key!r} is {'there twice' if key else 'empty'}")
            kind = self._scalar("<I", f"type of {key}")
            self._types[key] = kind
            metadata[key] = self._value(kind, key)
        return version, metadata, self._tensors(tensor_count, metadata)

    # ---- bytes ------------------------------------------------------------------------------------

    def _wrong(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self._name} is not a sound GGUF: {what} (near byte {self._at}).",
            hint="Download it again; if that does not help, the file was made wrong.",
        )

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

    def _string(self, what: str, limit: int = MAX_STRING) -> str:
        length: int = self._scalar("<Q", f"length of {what}")
        if length > min(limit, self._size - self._at):
            raise self._wrong(f"{what} says it has {length} bytes")
        try:
            return self._bytes(length, what).decode("utf-8")
        except UnicodeDecodeError:
            if what.startswith("metadata key"):
                raise self._wrong(f"{what} is not UTF-8") from None
            return ""  # values such as tokens may be any bytes

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], key)
        if kind == _BOOL:
            value = self._scalar("<B", key)
            if value > 1:
                raise self._wrong(f"{key} is {value}, but must be true or false")
            return bool(value)
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        raise self._wrong(f"{key} has the unknown type {kind}")

    def _array(self, key: str) -> GGUFArray:
        kind = self._scalar("<I", f"item type of {key}")
        if kind == _ARRAY or kind not in {*_SCALARS, _BOOL, _STRING}:
            raise self._wrong(f"{key} is an array of the unsupported type {kind}")
        width = 8 if kind == _STRING else 1 if kind == _BOOL else struct.calcsize(_SCALARS[kind])
        length = self._count(f"length of {key}", MAX_ARRAY, least_bytes=width)
        if length <= SHOWN_ITEMS or (kind in _INTEGERS and length <= MAX_LAYERS):
            return GGUFArray(kind, length, tuple(self._value(kind, key) for _ in range(length)))
        if kind == _STRING:
            for _ in range(length):
                self._skip_string(key)
        else:
            self._bytes(length * width, key)
        return GGUFArray(kind, length, None)

    def _skip_string(self, key: str) -> None:
        if self._size - self._at < 8:
            raise self._wrong(f"the file ends within {key}")
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        self._at += 8
        if length > min(MAX_STRING, self._size - self._at):
            raise self._wrong(f"an item of {key} says it has {length} bytes")
        self._at += length

    # ---- tensors ----------------------------------------------------------------------------------

    def _tensors(self, count: int, metadata: dict[str, Any]) -> list[_Tensor]:
        alignment = metadata.get("general.alignment", 32)
        if self._types.get("general.alignment", 4) != 4 or alignment not in {8 << n for n in range(14)}:
            raise self._wrong(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
        tensors = [self._tensor(index, alignment) for index in range(count)]
        if len({tensor.name for tensor in tensors}) < count:
            raise self._wrong("two tensors have the same name")
        start = self._data_start = -(-self._at // alignment) * alignment
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset != end:
                fault = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
                raise self._wrong(f"tensor {tensor.name} {fault}")
            if start + tensor.offset + tensor.size > self._size:
                raise self._wrong(
                    f"tensor {tensor.name} ends at byte {start + tensor.offset + tensor.size}, "
                    f"but the file has {self._size}: it is cut off"
                )
            end = -(-(tensor.offset + tensor.size) // alignment) * alignment
        return tensors

    def _tensor(self, index: int, alignment: int) -> _Tensor:
        name = self._string(f"name of tensor {index}", limit=MAX_NAME)
        if not name:
            raise self._wrong(f"the name of tensor {index} is empty or not UTF-8")
        dimensions = self._scalar("<I", f"dimensions of {name}")
        if not 1 <= dimensions <= 4:
            raise self._wrong(f"tensor {name} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self._scalar("<Q", f"shape of {name}") for _ in range(dimensions))
        kind = self._scalar("<I", f"type of {name}")
        offset: int = self._scalar("<Q", f"offset of {name}")
        if kind not in GGML_TYPES:
            raise self._wrong(f"tensor {name} has the unknown type {kind}")
        type_name, block, block_bytes = GGML_TYPES[kind]
        elements = _product(shape)
        if min(shape) < 1 or elements >= 1 << 62:
            raise self._wrong(f"tensor {name} has the impossible shape {list(shape)}")
        if shape[0] % block:
            raise self._wrong(
                f"rows of {name} have {shape[0]} elements, no multiple of {type_name}'s {block}"
            )
        if offset % alignment or offset > self._size:
            raise self._wrong(f"tensor {name} has the offset {offset}")
        return _Tensor(name, shape, offset, elements // block * block_bytes, type_name)

    # ---- what llama.cpp takes for granted ---------------------------------------------------------

    def _check_model(self, metadata: dict[str, Any], tensors: dict[str, _Tensor]) -> None:
        architecture = metadata.get("general.architecture")
        if (
            not isinstance(architecture, str)
            or not architecture.isprintable()
            or not 0 < len(architecture) < 64
        ):
            raise self._wrong("general.architecture is missing or not a name")
        layers = self._positive(metadata, f"{architecture}.block_count", MAX_LAYERS)
        width = self._positive(metadata, f"{architecture}.embedding_length", 1 << 20)
        self._positive(metadata, f"{architecture}.context_length", 1 << 31)
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            value = metadata.get(f"{architecture}.{key}")
            if isinstance(value, GGUFArray):
                if value.item_type not in _INTEGERS or value.length != layers:
                    raise self._wrong(f"{architecture}.{key} has not one whole number a layer")
            elif value is not None:
                self._positive(metadata, f"{architecture}.{key}", 1 << 24)
        heads = metadata.get(f"{architecture}.attention.head_count")
        shared = metadata.get(f"{architecture}.attention.head_count_kv", heads)
        if isinstance(heads, int) and isinstance(shared, int) and (heads % shared or heads > width):
            raise self._wrong(f"{heads} attention heads do not fit {shared} key heads and width {width}")
        for key in ("key_length", "value_length"):
            if f"{architecture}.attention.{key}" in metadata:
                self._positive(metadata, f"{architecture}.attention.{key}", 1 << 16)
        if f"{architecture}.rope.dimension_count" in metadata:
            self._positive(metadata, f"{architecture}.rope.dimension_count", 1 << 16)
        self._check_vocabulary(metadata, tensors.get("token_embd.weight"), width)

    def _positive(self, metadata: dict[str, Any], key: str, limit: int) -> int:
        value = metadata.get(key)
        if self._types.get(key) not in _INTEGERS or not isinstance(value, int) or not 0 < value <= limit:
            raise self._wrong(f"{key} is {value!r}, not a whole number from 1 to {limit}")
        return value

    def _check_vocabulary(self, metadata: dict[str, Any], embedding: _Tensor | None, width: int) -> None:
        if embedding is None:
            raise self._wrong("there is no tensor token_embd.weight")
        if len(embedding.shape) != 2 or embedding.shape[0] != width:
            raise self._wrong(
                f"token_embd.weight has the shape {list(embedding.shape)}, not [{width}, tokens]"
            )
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, GGUFArray) or tokens.item_type != _STRING or not tokens.length:
            raise self._wrong("tokenizer.ggml.tokens is not a list of tokens")
        if tokens.length > embedding.shape[1]:
            raise self._wrong(f"{tokens.length} tokens have only {embedding.shape[1]} embeddings")
        for key, kinds in (("scores", {6}), ("token_type", _INTEGERS)):
            array = metadata.get(f"tokenizer.ggml.{key}")
            if array is not None and not (
                isinstance(array, GGUFArray) and array.length == tokens.length and array.item_type in kinds
            ):
                raise self._wrong(f"tokenizer.ggml.{key} has not one number a token")
        merges = metadata.get("tokenizer.ggml.merges")
        if merges is not None and not (isinstance(merges, GGUFArray) and merges.item_type == _STRING):
            raise self._wrong("tokenizer.ggml.merges is not a list of texts")
        self._check_token_ids(metadata, tokens.length)

    def _check_token_ids(self, metadata: dict[str, Any], tokens: int) -> None:
        for key, value in metadata.items():
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
                if self._types[key] not in _INTEGERS or not 0 <= value < tokens:
                    raise self._wrong(f"{key} is {value!r}, but there are {tokens} tokens")
            elif key in _TEXTS and self._types[key] != _STRING:
                raise self._wrong(f"{key} is not a text")


_TEXTS = frozenset({"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", "general.name"})


def _matrix_bytes(tensors: list[_Tensor]) -> dict[str, int]:
    separate_output = any(tensor.name == "output.weight" for tensor in tensors)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        looked_up = tensor.name == "token_embd.weight" and separate_output
        if len(tensor.shape) > 1 and not looked_up:
            sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.size
    return sizes


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
