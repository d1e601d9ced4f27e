"""Is this file a LoRA adapter that fits this model?

llama.cpp's loader of adapters asserts where it should doubt (the types of its metadata), and it knows nothing
of the bytes that an adapter was trained over, so no file reaches it that has not passed here.
Format: `convert_lora_to_gguf.py` of llama.cpp: `<tensor>.lora_a` [rank, inputs] and `.lora_b` [outputs, rank]
(rows first) for tensors of the model, scaled by `adapter.lora.alpha` / rank.
Invariant: only headers are trusted to be short; the numbers of an adapter are read once and must be finite.
Not covered: adapters on embeddings and on experts (3 dimensions), activated LoRA, control vectors.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lichen.errors import AdapterError
from lichen.quant.formats import GGMLType, ValueType
from lichen.quant.gguf_check import header_of
from lichen.quant.gguf_header import Header, TensorSpan

BASE_KEY = "lichen.base.sha256"
TYPES = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})
HEADS = ("head_count", "head_count_kv")
MAX_RANK = 4096
MAX_ALPHA = 1e6
_PARTS = (".lora_a", ".lora_b")
_PIECE = 1 << 22  # bytes of numbers that are looked at at a time


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a sound adapter says of itself. base: sha256 of the model's file, empty where it does not say.

    ranks: of each adapted tensor, by the model's name for it. size: bytes of all numbers. heads: the model's,
    of queries and of keys; 0 where they differ by layer.
    """

    architecture: str
    base: str
    alpha: float
    ranks: dict[str, int]
    size: int
    heads: tuple[int, int]


def check_adapter(path: Path, model: Path) -> AdapterSummary:
    """Check an adapter's file against the header of a model's. O(adapter), and O(header) of the model.

    Raises ModelFileError for a file that is no sound GGUF, AdapterError for an adapter that does not fit.
    """
    header, base = header_of(path), header_of(model)
    architecture = _text(header, "general.architecture")
    if _text(header, "general.type") != "adapter" or _text(header, "adapter.type") != "lora":
        raise AdapterError(f"{path.name} is no LoRA adapter.")
    wanted = base.metadata.get("general.architecture")
    if wanted is None or architecture != wanted.content:
        raise AdapterError(
            f"{path.name} is for models of the kind {architecture!r}, but {model.name} is another."
        )
    alpha = header.metadata.get("adapter.lora.alpha")
    if alpha is None or alpha.type is not ValueType.FLOAT32 or not isinstance(alpha.content, float):
        raise AdapterError(f"{path.name} does not say its adapter.lora.alpha as a 32-bit number.")
    if not 0 < abs(alpha.content) <= MAX_ALPHA:  # nan fails too
        raise AdapterError(f"{path.name} has the alpha {alpha.content}, which is no usable number.")
    if any(key.startswith("adapter.alora.") for key in header.metadata):
        raise AdapterError(f"{path.name} is an activated LoRA, which lichen cannot serve.")
    ranks = _ranks(path, header, model, base)
    _check_numbers(path, header)
    digest = header.metadata.get(BASE_KEY)
    heads = {key: base.metadata.get(f"{architecture}.attention.{key}") for key in HEADS}
    return AdapterSummary(
        architecture=architecture,
        base="" if digest is None else str(digest.content),
        alpha=alpha.content,
        ranks=ranks,
        size=sum(tensor.size for tensor in header.tensors),
        heads=head_counts({key: said.content for key, said in heads.items() if said is not None}),
    )


def head_counts(said: Mapping[str, Any]) -> tuple[int, int]:
    """Attention heads of queries and of keys, from a model's metadata by `HEADS`."""
    queries = said.get(HEADS[0])
    keys = said.get(HEADS[1], queries)
    return queries if isinstance(queries, int) else 0, keys if isinstance(keys, int) else 0


def _text(header: Header, key: str) -> str:
    value = header.metadata.get(key)
    if value is None or not isinstance(value.content, str) or not value.content.isprintable():
        raise AdapterError(f"{header.name} has no text {key}, so it is no adapter.")
    return value.content


def _ranks(path: Path, header: Header, model: Path, base: Header) -> dict[str, int]:
    """The rank of each adapted tensor; every part has its partner and fits the model's tensor."""
    targets = {tensor.name: tensor for tensor in base.tensors}
    parts = {tensor.name: tensor for tensor in header.tensors}
    if not parts:
        raise AdapterError(f"{path.name} adapts nothing.")
    ranks: dict[str, int] = {}
    for name, part in parts.items():
        if not name.endswith(_PARTS):
            raise AdapterError(f"{path.name} holds {name}, which is no part of a LoRA adapter.")
        target = targets.get(name[:-7])
        if target is None or len(target.shape) != 2 or target.name == "token_embd.weight":
            raise AdapterError(
                f"{path.name} adapts {name[:-7]}, which {model.name} does not have as a layer."
            )
        if any(name[:-7] + end not in parts for end in _PARTS):
            raise AdapterError(f"{path.name} has only one half of the adapter of {target.name}.")
        if part.type not in TYPES:
            raise AdapterError(f"{name} is stored as {part.type.name}; lichen serves F32, F16 and BF16.")
        if name.endswith(_PARTS[0]):
            ranks[target.name] = _rank(path, target, part, parts[target.name + _PARTS[1]])
    return ranks


def _rank(path: Path, target: TensorSpan, a: TensorSpan, b: TensorSpan) -> int:
    inputs, outputs = target.shape  # as in the file, columns first
    rank = a.shape[1] if len(a.shape) == 2 else 0
    if a.shape != (inputs, rank) or b.shape != (rank, outputs) or not 0 < rank <= MAX_RANK:
        raise AdapterError(
            f"{path.name} does not fit {target.name}: its parts have the shapes {list(a.shape)} and "
            f"{list(b.shape)}, but the layer has {inputs} inputs and {outputs} outputs."
        )
    return rank


def _check_numbers(path: Path, header: Header) -> None:
    """Raise AdapterError for inf and nan, which would spread into every answer and into the cache.

    A number is neither where not all bits of its exponent are set.
    """
    import numpy as np

    exponents = {
        GGMLType.F32: (np.uint32, 0x7F800000),
        GGMLType.F16: (np.uint16, 0x7C00),
        GGMLType.BF16: (np.uint16, 0x7F80),
    }
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for tensor in header.tensors:
            kind, mask = exponents[tensor.type]
            for start in range(tensor.start, tensor.start + tensor.size, _PIECE):
                size = min(_PIECE, tensor.start + tensor.size - start)
                numbers = np.frombuffer(data[start : start + size], kind)
                if bool(((numbers & mask) == mask).any()):
                    raise AdapterError(f"{path.name} holds inf or nan in {tensor.name}.")
