"""Which type a tensor can be stored as: names, tensors that stay as they are, and what fits a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lichen.errors import ConfigError
from lichen.quant import ggml
from lichen.quant.formats import BLOCKS, GGMLType, row_bytes
from lichen.quant.gguf import GGUFTensor

# Where a row does not consist of a type's blocks: the first of these with as many bits and fitting blocks.
STAND_INS = (GGMLType.IQ4_NL, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.F16)

# Small, and a rounding there acts on all that follows: routers of experts, convolutions of state spaces.
_KEPT_PARTS = ("ffn_gate_inp", "ssm_conv1d", "shortconv", "pos_embd", "token_types")

_FLOATS = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64})

# llama.h, enum llama_ftype: what a whole file is called by the type of most of its weights
FILE_TYPES: Mapping[GGMLType, int] = {
    GGMLType.F32: 0, GGMLType.F16: 1, GGMLType.Q4_0: 2, GGMLType.Q4_1: 3, GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8, GGMLType.Q5_1: 9, GGMLType.Q2_K: 10, GGMLType.Q3_K: 12, GGMLType.Q4_K: 15,
    GGMLType.Q5_K: 17, GGMLType.Q6_K: 18, GGMLType.IQ2_XXS: 19, GGMLType.IQ2_XS: 20,
    GGMLType.IQ3_XXS: 23, GGMLType.IQ1_S: 24, GGMLType.IQ4_NL: 25, GGMLType.IQ3_S: 26,
    GGMLType.IQ2_S: 28, GGMLType.IQ4_XS: 30, GGMLType.IQ1_M: 31, GGMLType.BF16: 32,
    GGMLType.TQ1_0: 36, GGMLType.TQ2_0: 37, GGMLType.MXFP4: 38, GGMLType.NVFP4: 39,
    GGMLType.Q1_0: 40, GGMLType.Q2_0: 41,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """types: what each tensor of a file becomes. stand_ins: where it is not what was asked for, that."""

    types: Mapping[str, GGMLType]
    stand_ins: Mapping[str, GGMLType]


def type_named(name: str) -> GGMLType:
    """The type of that name, such as q4_k. Raises ConfigError that lists the names."""
    kind = GGMLType.__members__.get(name.strip().upper())
    if kind is None or kind not in FILE_TYPES:
        names = ", ".join(kind.name for kind in FILE_TYPES)
        raise ConfigError(f"{name!r} is no type that a model can be stored as.", hint=f"There are: {names}.")
    return kind


def bits(kind: GGMLType) -> float:
    """Bits of one weight."""
    elements, size = BLOCKS[kind]
    return 8 * size / elements


def stored_bytes(tensor: GGUFTensor, kind: GGMLType) -> int:
    """Bytes of a tensor as that type. Raises TensorError when its rows are no whole blocks."""
    return math.prod(tensor.shape[:-1]) * row_bytes(kind, tensor.shape[-1])


def is_matrix(tensor: GGUFTensor) -> bool:
    """Whether a tensor is one whose type may be chosen."""
    return (
        len(tensor.shape) > 1
        and tensor.type in ggml.DEQUANTIZABLE
        and not any(part in tensor.name for part in _KEPT_PARTS)
    )


def kept_type(tensor: GGUFTensor) -> GGMLType:
    """The type of a tensor that is not chosen: vectors of numbers are F32, all else stays."""
    return GGMLType.F32 if len(tensor.shape) == 1 and tensor.type in _FLOATS else tensor.type


def fits(tensor: GGUFTensor, kind: GGMLType) -> bool:
    """Whether a tensor's rows consist of whole blocks of a type."""
    return tensor.shape[-1] % BLOCKS[kind][0] == 0


def fitting(tensor: GGUFTensor, kind: GGMLType) -> GGMLType:
    """The type itself, or the smallest stand-in with no fewer bits whose blocks fit the rows."""
    if fits(tensor, kind):
        return kind
    return next(
        (other for other in STAND_INS if bits(other) >= bits(kind) and fits(tensor, other)), GGMLType.F16
    )


def plan_for(tensors: Iterable[GGUFTensor], kind: GGMLType) -> Plan:
    """All matrices as one type, as far as it fits."""
    types: dict[str, GGMLType] = {}
    stand_ins: dict[str, GGMLType] = {}
    for tensor in tensors:
        types[tensor.name] = fitting(tensor, kind) if is_matrix(tensor) else kept_type(tensor)
        if is_matrix(tensor) and types[tensor.name] is not kind:
            stand_ins[tensor.name] = kind
    return Plan(types, stand_ins)


def file_type(tensors: Iterable[GGUFTensor], types: Mapping[str, GGMLType]) -> int:
    """general.file_type: that of the type which holds most weights."""
    held: dict[GGMLType, int] = {}
    for tensor in tensors:
        kind = types[tensor.name]
        elements, size = BLOCKS[kind]
        held[kind] = held.get(kind, 0) + stored_bytes(tensor, kind) // size * elements
    return FILE_TYPES.get(max(held, key=lambda kind: held[kind]), 1024)  # LLAMA_FTYPE_GUESSED
