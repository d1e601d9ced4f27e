"""The tensor types of ggml and the value types of GGUF: numbers, names and sizes, and nothing native.

Sources: enum ggml_type of ggml.h and docs/gguf.md of ggml. `ggml.py` holds this table against the
installed library when it is imported, so that the two cannot drift apart unseen.
"""

from __future__ import annotations

from enum import IntEnum, unique

from lichen.errors import TensorError


@unique
class GGMLType(IntEnum):
    """How the numbers of a tensor are stored. The values are those in a file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# type -> (elements a block, bytes a block)
BLOCKS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 36),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.F64: (1, 8),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
    GGMLType.NVFP4: (64, 36),
    GGMLType.Q1_0: (128, 18),
    GGMLType.Q2_0: (64, 18),
}


@unique
class ValueType(IntEnum):
    """How a value of a GGUF's metadata is stored. The numbers are those in a file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# value type -> format of `struct`, little endian
SCALARS: dict[ValueType, str] = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
INTEGERS = frozenset(SCALARS) - {ValueType.FLOAT32, ValueType.BOOL, ValueType.FLOAT64}


def tensor_type(number: int) -> GGMLType:
    """The type of that number. Raises TensorError when there is none."""
    try:
        return GGMLType(number)
    except ValueError:
        raise TensorError(
            f"{number} is the number of no tensor type that lichen knows.",
            hint="Take a model in another format, or a newer lichen.",
        ) from None


def block_size(type: GGMLType | int) -> int:
    """Elements that are stored together, always along a row. Raises TensorError for an unknown type."""
    return BLOCKS[tensor_type(type)][0]


def row_bytes(type: GGMLType | int, columns: int) -> int:
    """Bytes of one row of that many elements.

    Raises TensorError for an unknown type or when the row does not consist of whole blocks.
    """
    known = tensor_type(type)
    elements, size = BLOCKS[known]
    if columns < 1 or columns % elements:
        raise TensorError(
            f"A row of {columns} elements cannot be {known.name}, which is stored in blocks of {elements}.",
            hint="Keep this tensor as F16 or F32." if columns > 0 else None,
        )
    return columns // elements * size
