"""Is this file a GGUF that a model can be loaded from?

The native loader asserts where it should doubt, and an assertion ends the whole process, so no file
reaches it that has not passed here. `gguf_header.py` checks the format; here the facts that llama.cpp
takes for granted are checked on top: the shapes of the embedding, the lengths of the vocabulary's
arrays, the ranges of token ids.
Not covered: the values of the weights.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lichen.errors import ModelFileError
from lichen.quant.formats import BLOCKS, INTEGERS, ValueType
from lichen.quant.gguf_header import (
    ArraySpan,
    Bytes,
    Header,
    HeaderValue,
    TensorSpan,
    array_items,
    read_header,
)

SHOWN_ITEMS = 16  # longer arrays are summarised, except whole numbers that may be one a layer
MAX_LAYERS = 1024

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
    return _with_header(path, _summary)


def header_of(path: Path) -> Header:
    """The header of any GGUF (a model's or an adapter's), its format checked. Raises ModelFileError."""
    return _with_header(path, lambda _data, header: header)


def tensor_places(path: Path) -> list[TensorPlace]:
    """Where the tensors of any GGUF lie (a model's or an adapter's), in the order of their bytes.

    Only the format is checked, not what llama.cpp needs of a model. Raises ModelFileError.
    """
    return _with_header(path, _places)


def _with_header(path: Path, read: Callable[[Bytes, Header], _Found]) -> _Found:
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file.")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelFileError(f"{path.name} is not a GGUF: it has only 0 bytes.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read(data, read_header(data, path.name))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error


def _places(_data: Bytes, header: Header) -> list[TensorPlace]:
    spans = sorted(header.tensors, key=lambda span: span.start)
    return [TensorPlace(span.name, span.start, span.size, BLOCKS[span.type][1]) for span in spans]


def _summary(data: Bytes, header: Header) -> GGUFSummary:
    metadata = {key: _shown(data, header, key, value) for key, value in header.metadata.items()}
    check_model(header)
    architecture = str(metadata["general.architecture"])
    return GGUFSummary(
        architecture=architecture,
        version=header.version,
        tensor_count=len(header.tensors),
        parameter_count=sum(math.prod(tensor.shape) for tensor in header.tensors),
        tensor_bytes=sum(tensor.size for tensor in header.tensors),
        context_train=int(metadata.get(f"{architecture}.context_length", 0)),
        metadata=metadata,
        matrix_bytes=_matrix_bytes(header.tensors),
    )


def _shown(data: Bytes, header: Header, key: str, value: HeaderValue) -> Any:
    """The value as a summary has it: plain, long arrays by their length, texts that are not UTF-8 empty."""
    content = value.content
    if isinstance(content, str):
        return _utf8(content)
    if not isinstance(content, ArraySpan):
        return content
    if content.item_type is ValueType.ARRAY:
        raise header.wrong(f"{key} is an array of the unsupported type {int(ValueType.ARRAY)}")
    few = content.length <= SHOWN_ITEMS
    if not few and not (content.item_type in INTEGERS and content.length <= MAX_LAYERS):
        return GGUFArray(content.item_type, content.length, None)
    items = (_utf8(item) if isinstance(item, str) else item for item in array_items(data, content))
    return GGUFArray(content.item_type, content.length, tuple(items))


def _utf8(text: str) -> str:
    return "" if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def _matrix_bytes(tensors: tuple[TensorSpan, ...]) -> dict[str, int]:
    separate_output = any(tensor.name == "output.weight" for tensor in tensors)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        looked_up = tensor.name == "token_embd.weight" and separate_output
        if len(tensor.shape) > 1 and not looked_up:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.size
    return sizes


# ---- what llama.cpp takes for granted -------------------------------------------------------------

_TEXTS = frozenset({"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", "general.name"})


def check_model(header: Header) -> None:
    """Refuse a header that is no language model's. Raises ModelFileError that names the key."""
    _ModelCheck(header).run()


class _ModelCheck:
    def __init__(self, header: Header) -> None:
        self._header, self._metadata, self._wrong = header, header.metadata, header.wrong

    def run(self) -> None:
        architecture = self._content("general.architecture")
        if (
            not isinstance(architecture, str)
            or not architecture.isprintable()
            or not 0 < len(architecture) < 64
        ):
            raise self._wrong("general.architecture is missing or not a name")
        layers = self._positive(f"{architecture}.block_count", MAX_LAYERS)
        width = self._positive(f"{architecture}.embedding_length", 1 << 20)
        self._positive(f"{architecture}.context_length", 1 << 31)
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            value = self._content(f"{architecture}.{key}")
            if isinstance(value, ArraySpan):
                if value.item_type not in INTEGERS or value.length != layers:
                    raise self._wrong(f"{architecture}.{key} has not one whole number a layer")
            elif value is not None:
                self._positive(f"{architecture}.{key}", 1 << 24)
        heads = self._content(f"{architecture}.attention.head_count")
        shared = self._content(f"{architecture}.attention.head_count_kv", heads)
        if isinstance(heads, int) and isinstance(shared, int) and (heads % shared or heads > width):
            raise self._wrong(f"{heads} attention heads do not fit {shared} key heads and width {width}")
        for key in ("key_length", "value_length"):
            if f"{architecture}.attention.{key}" in self._metadata:
                self._positive(f"{architecture}.attention.{key}", 1 << 16)
        if f"{architecture}.rope.dimension_count" in self._metadata:
            self._positive(f"{architecture}.rope.dimension_count", 1 << 16)
        self._check_vocabulary(width)

    def _content(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(key)
        return default if value is None else value.content

    def _positive(self, key: str, limit: int) -> int:
        value = self._metadata.get(key)
        content = None if value is None else value.content
        if value is None or value.type not in INTEGERS or not isinstance(content, int):
            raise self._wrong(f"{key} is {_said(content)}, not a whole number from 1 to {limit}")
        if not 0 < content <= limit:
            raise self._wrong(f"{key} is {content}, not a whole number from 1 to {limit}")
        return content

    def _check_vocabulary(self, width: int) -> None:
        embedding = {tensor.name: tensor for tensor in self._header.tensors}.get("token_embd.weight")
        if embedding is None:
            raise self._wrong("there is no tensor token_embd.weight")
        if len(embedding.shape) != 2 or embedding.shape[0] != width:
            raise self._wrong(
                f"token_embd.weight has the shape {list(embedding.shape)}, not [{width}, tokens]"
            )
        tokens = self._content("tokenizer.ggml.tokens")
        if not _is_array(tokens, {ValueType.STRING}) or not tokens.length:
            raise self._wrong("tokenizer.ggml.tokens is not a list of tokens")
        if tokens.length > embedding.shape[1]:
            raise self._wrong(f"{tokens.length} tokens have only {embedding.shape[1]} embeddings")
        for key, kinds in (("scores", {ValueType.FLOAT32}), ("token_type", INTEGERS)):
            array = self._content(f"tokenizer.ggml.{key}")
            if array is not None and not (_is_array(array, kinds) and array.length == tokens.length):
                raise self._wrong(f"tokenizer.ggml.{key} has not one number a token")
        merges = self._content("tokenizer.ggml.merges")
        if merges is not None and not _is_array(merges, {ValueType.STRING}):
            raise self._wrong("tokenizer.ggml.merges is not a list of texts")
        self._check_token_ids(tokens.length)

    def _check_token_ids(self, tokens: int) -> None:
        for key, value in self._metadata.items():
            content = value.content
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
                if value.type not in INTEGERS or not isinstance(content, int) or not 0 <= content < tokens:
                    raise self._wrong(f"{key} is {_said(content)}, but there are {tokens} tokens")
            elif key in _TEXTS and value.type is not ValueType.STRING:
                raise self._wrong(f"{key} is not a text")


def _is_array(content: Any, kinds: frozenset[ValueType] | set[ValueType]) -> bool:
    return isinstance(content, ArraySpan) and content.item_type in kinds


def _said(content: Any) -> str:
    return "an array" if isinstance(content, ArraySpan) else repr(content)
