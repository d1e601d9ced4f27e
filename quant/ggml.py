"""The one place that calls ggml: its quantizers and dequantizers over buffers of the caller.

The functions are those that llama.cpp itself uses, out of the shared library in the llama-cpp-python
package, so training, export and inference see the same numbers, bit for bit. Rows are shared out to
threads (ctypes releases the GIL), which changes no bit, since every block depends on its row alone.

Invariants: nothing here allocates a tensor; buffers are read and written in place. Sizes, types and
values are checked before a pointer is passed on, since ggml ends the process where it should refuse.
The struct that is read from the library is held against `formats.py` when this module is imported.
Not covered: matrix products, other devices, big-endian machines. Torch is never imported: hand over
`tensor.numpy()`, which shares the tensor's memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lichen.errors import EngineError, ModelFileError, TensorError
from lichen.quant.buffers import float_numbers, stored_bytes
from lichen.quant.formats import BLOCKS, GGMLType, block_size, row_bytes, tensor_type
from lichen.quant.grid import GRID_TYPES, first_off_grid
from lichen.quant.shares import diminishing, share_out

__all__ = [
    "DEQUANTIZABLE",
    "NEEDS_IMPORTANCE",
    "QUANTIZABLE",
    "GGMLType",
    "block_size",
    "check_rows",
    "dequantize",
    "quantize",
    "row_bytes",
]

PIECE = 1 << 17  # elements that one thread converts at a time, at least: some 80 microseconds of Q4_1

# Those that ggml_quantize_chunk knows; for any other it ends the process.
_CHUNK_TYPES = frozenset(GGMLType) - {
    GGMLType.Q8_1,
    GGMLType.Q8_K,
    GGMLType.I8,
    GGMLType.I16,
    GGMLType.I32,
    GGMLType.I64,
    GGMLType.F64,
}

# ggml_validate_row_data knows all but this one, which holds activations and never stands in a file.
_CHECKED_TYPES = frozenset(GGMLType) - {GGMLType.Q8_1}

_LARGEST = 65504.0  # of F16, in which scales are stored; past it some quantizers give zeros and say nothing


class Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_void_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_Convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def _library_path() -> Path:
    """libggml-base as llama.cpp's bindings will load it, found without importing them."""
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):  # the bindings obey it too
        folder = Path(override)
    else:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise EngineError(
                "The llama-cpp-python package is not installed.", hint="Run: pip install llama-cpp-python"
            )
        folder = Path(spec.submodule_search_locations[0]) / "lib"
    names = {
        "darwin": ("libggml-base.dylib", "libggml-base.so"),
        "win32": ("ggml-base.dll", "libggml-base.dll"),
    }.get(sys.platform, ("libggml-base.so",))
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EngineError(
        f"{folder} has no {names[0]}.", hint="Install llama-cpp-python again; lichen needs its ggml library."
    )


def _load(path: Path) -> ctypes.CDLL:
    """The library with its functions declared. Raises EngineError when one is missing."""
    # libgomp, which ggml is linked to, reads this once: see runtime/native.py and docs/decisions/0003.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))
    pointer, length, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_get_type_traits": (ctypes.POINTER(Traits), (number,)),
        "ggml_type_name": (ctypes.c_void_p, (number,)),
        "ggml_blck_size": (ctypes.c_int64, (number,)),
        "ggml_type_size": (length, (number,)),
        "ggml_is_quantized": (ctypes.c_bool, (number,)),
        "ggml_version": (ctypes.c_char_p, ()),
        "ggml_quantize_init": (None, (number,)),
        "ggml_quantize_requires_imatrix": (ctypes.c_bool, (number,)),
        "ggml_quantize_chunk": (
            length,
            (number, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer),
        ),
        "ggml_validate_row_data": (ctypes.c_bool, (number, pointer, length)),
    }
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineError(f"ggml's shared library cannot be used: {error}.") from error
    return library


def read_traits(library: Any, kind: GGMLType) -> Traits:
    """What the library knows of a type. Raises EngineError unless it is what `formats.py` says.

    Whole numbers come first: a name is a pointer, followed only where all else is as it must be.
    """
    traits: Traits = library.ggml_get_type_traits(kind).contents
    elements, size = BLOCKS[kind]
    found = (traits.blck_size, traits.type_size, traits.is_quantized)
    asked = (library.ggml_blck_size(kind), library.ggml_type_size(kind), library.ggml_is_quantized(kind))
    # i8 to f64 and the floats are not quantized; all else has blocks
    if found != (elements, size, elements > 1) or asked != found:
        raise _skew(library, f"type {kind} has (block, bytes, quantized) {found} and {asked}")
    if not traits.type_name or library.ggml_type_name(kind) != traits.type_name:
        raise _skew(library, f"type {kind} has two names")
    name = ctypes.string_at(traits.type_name, len(kind.name) + 1)
    if name.rstrip(b"\0").decode("ascii", "replace").lower() != kind.name.lower():
        raise _skew(library, f"type {kind} is called {name!r}, not {kind.name}")
    for field, symbol in (("to_float", "dequantize_row_{}"), ("from_float_ref", "quantize_row_{}_ref")):
        function = getattr(library, symbol.format(_symbol(kind)), None)
        address = ctypes.cast(function, ctypes.c_void_p).value if function is not None else None
        if getattr(traits, field) and address and address != getattr(traits, field):
            raise _skew(library, f"{field} of {kind.name} is another function")
    return traits


def _symbol(kind: GGMLType) -> str:
    """Its part of the names of functions, such as q4_K and iq2_xxs."""
    return kind.name.lower().replace("_k", "_K")


def _skew(library: Any, what: str) -> EngineError:
    version = (library.ggml_version() or b"?").decode("ascii", "replace")
    return EngineError(
        f"The installed ggml {version} differs from what lichen was written for: {what}.",
        hint="Install a version of llama-cpp-python that lichen's constraints.txt names.",
    )


_library = _load(_library_path())
_traits: dict[GGMLType, Traits] = {kind: read_traits(_library, kind) for kind in GGMLType}
_to_float = {kind: _Convert(traits.to_float) for kind, traits in _traits.items() if traits.to_float}
_from_float = {
    kind: _Convert(traits.from_float_ref) for kind, traits in _traits.items() if traits.from_float_ref
}

DEQUANTIZABLE: frozenset[GGMLType] = frozenset(_to_float) | {GGMLType.F32}
QUANTIZABLE: frozenset[GGMLType] = _CHUNK_TYPES | frozenset(_from_float)
NEEDS_IMPORTANCE: frozenset[GGMLType] = frozenset(
    kind for kind in _CHUNK_TYPES if _library.ggml_quantize_requires_imatrix(kind)
)


def dequantize(type: GGMLType, source: Any, out: Any, threads: int | None = None) -> None:
    """Turn stored rows into float32.

    source: contiguous buffer of the stored bytes, uint8 or any other. out: writable, contiguous float32
    buffer of shape [..., columns], as many rows as source has. threads: None for one a core.
    Raises TensorError when the sizes do not fit each other or the type cannot be read.
    """
    kind = _known(type, DEQUANTIZABLE, "dequantized")
    data = stored_bytes(source, "source")
    numbers = float_numbers(out, "out", writable=True)
    _check_sizes(kind, data, numbers)
    elements, size = BLOCKS[kind]
    cuts = diminishing(numbers.size // elements, PIECE // elements, threads)
    convert = _to_float.get(kind)
    base, target = data.ctypes.data, numbers.ctypes.data

    def piece(index: int) -> None:
        first, count = cuts[index], cuts[index + 1] - cuts[index]
        read, write = base + first * size, target + first * elements * 4
        if convert is None:
            ctypes.memmove(write, read, count * size)
        else:
            convert(read, write, count * elements)

    share_out(len(cuts) - 1, piece, threads)


def quantize(
    type: GGMLType,
    source: Any,
    out: Any,
    importance: Any | None = None,
    threads: int | None = None,
) -> None:
    """Store rows of float32 as another type.

    source: contiguous float32 buffer of shape [..., columns]. out: writable, contiguous buffer of
    exactly the bytes that it takes. importance: float32 of shape [columns], how much an error in each
    column matters (the mean of its squared inputs); types of NEEDS_IMPORTANCE cannot do without, and
    unquantized ones take no notice. threads: None for one a core.
    Raises TensorError when sizes do not fit, when a number of source is not finite or too large for the
    type (naming the row), or when importance is missing or no weight; `out` is then undefined.
    """
    kind = _known(type, QUANTIZABLE, "quantized")
    numbers = float_numbers(source, "source", writable=False)
    data = stored_bytes(out, "out", writable=True)
    _check_sizes(kind, data, numbers)
    columns = numbers.shape[-1] if numbers.ndim else 1
    weights = _weights(kind, importance, columns)
    rows = numbers.reshape(-1, columns)
    stored = data.reshape(len(rows), row_bytes(kind, columns))
    step = max(1, PIECE // columns)
    if kind in _CHUNK_TYPES:
        _library.ggml_quantize_init(kind)  # tables of the IQ types, made once

    def piece(index: int) -> None:
        first = index * step
        part, target = rows[first : first + step], stored[first : first + step]
        _refuse_numbers(kind, part, weights, first)
        _quantize_rows(kind, part, target, weights)
        if (bad := _first_bad(kind, target)) is not None:
            raise _too_large(kind, first + bad)

    share_out(-(-len(rows) // step), piece, threads)


def check_rows(type: GGMLType, data: Any, threads: int | None = None) -> None:
    """Refuse stored rows that would not come out as finite numbers. data: [rows, row_bytes], or flat.

    ggml says on stderr which block it was. Raises ModelFileError that names the row (of flat data, the
    block), and TensorError for an unknown type or a part of a block.
    """
    kind = _known(type, _CHECKED_TYPES, "checked")
    stored = stored_bytes(data, "data")
    elements, size = BLOCKS[kind]
    if stored.nbytes % size or (stored.ndim > 1 and stored.shape[-1] % size):
        raise TensorError(
            f"{stored.nbytes} bytes are no whole number of blocks of {kind.name} ({size} each)."
        )
    unit = "Row" if stored.ndim > 1 else "Block"
    rows = stored.reshape(-1, stored.shape[-1] if stored.ndim > 1 else size)
    step = max(1, PIECE * size // elements // max(1, rows.shape[1]))

    def piece(index: int) -> None:
        first = index * step
        if (bad := _first_bad(kind, rows[first : first + step])) is not None:
            raise ModelFileError(
                f"{unit} {first + bad} of a tensor stored as {kind.name} holds inf or nan.",
                hint="The file was damaged or made wrong; download it again.",
            )

    share_out(-(-len(rows) // step), piece, threads)


# ---- numbers that no block can hold ---------------------------------------------------------------


def _refuse_numbers(
    kind: GGMLType, part: npt.NDArray[np.float32], weights: npt.NDArray[np.float32] | None, first: int
) -> None:
    """Raises TensorError naming the row. part: [rows, columns], of which the first is row `first`."""
    peaks = np.maximum(part.max(axis=1), -part.min(axis=1))  # nan where there is one
    finite = np.isfinite(peaks)
    if not finite.all():
        raise TensorError(
            f"Row {first + int(finite.argmin())} cannot be quantized: it holds inf or nan.",
            hint="Repair or retrain the tensor; such a number would spoil its whole block.",
        )
    if BLOCKS[kind][0] > 1 and peaks.max() > _LARGEST:
        raise _too_large(kind, first + int(peaks.argmax()))
    if kind in GRID_TYPES and (bad := first_off_grid(part, weights)) is not None:
        raise TensorError(
            f"Row {first + bad} cannot be {kind.name}: some of its numbers, or their importance, are too "
            "small or too large.",
            hint="Give every column some importance, or store this tensor as a type of the K family.",
        )


def _too_large(kind: GGMLType, row: int) -> TensorError:
    return TensorError(
        f"Row {row} does not fit {kind.name}: its numbers, or their importance, are too large.",
        hint="Keep this tensor as BF16 or F32.",
    )


# ---- natively -------------------------------------------------------------------------------------


def _quantize_rows(
    kind: GGMLType,
    part: npt.NDArray[np.float32],
    target: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32] | None,
) -> None:
    if kind not in _CHUNK_TYPES:  # a type of activations; the library has only the plain function
        _from_float[kind](part.ctypes.data, target.ctypes.data, part.size)
        return
    pointer = None if weights is None else weights.ctypes.data
    written = _library.ggml_quantize_chunk(
        kind, part.ctypes.data, target.ctypes.data, 0, part.shape[0], part.shape[1], pointer
    )
    if written != target.nbytes:
        raise EngineError(f"ggml wrote {written} bytes of {kind.name} where {target.nbytes} were due.")


def _first_bad(kind: GGMLType, rows: npt.NDArray[np.uint8]) -> int | None:
    """Index of the first row that ggml calls invalid."""
    if kind not in _CHECKED_TYPES or not rows.size:
        return None
    if _library.ggml_validate_row_data(kind, rows.ctypes.data, rows.nbytes):
        return None
    for index, row in enumerate(rows):
        if not _library.ggml_validate_row_data(kind, row.ctypes.data, row.nbytes):
            return index
    return 0


# ---- what the caller hands over -------------------------------------------------------------------


def _known(type: GGMLType | int, able: frozenset[GGMLType], what: str) -> GGMLType:
    kind = tensor_type(type)
    if kind not in able:
        raise TensorError(f"{kind.name} cannot be {what}: ggml has no function for it.")
    return kind


def _check_sizes(kind: GGMLType, data: npt.NDArray[np.uint8], numbers: npt.NDArray[np.float32]) -> None:
    columns = numbers.shape[-1] if numbers.ndim else 1
    needed = row_bytes(kind, columns) * (numbers.size // columns)
    if data.nbytes != needed:
        raise TensorError(
            f"{numbers.size // columns} rows of {columns} elements take {needed} bytes as {kind.name}, "
            f"but the buffer has {data.nbytes}."
        )


def _weights(kind: GGMLType, importance: Any | None, columns: int) -> npt.NDArray[np.float32] | None:
    if importance is None:
        if kind in NEEDS_IMPORTANCE:
            raise TensorError(
                f"{kind.name} needs an importance for each column: so few bits cannot serve all alike.",
                hint="Compute an importance matrix first, or take a larger type.",
            )
        return None
    weights = float_numbers(importance, "importance", writable=False)
    if weights.shape != (columns,):
        raise TensorError(f"importance has the shape {list(weights.shape)}, not [{columns}].")
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise TensorError("importance must hold finite numbers from 0 up, and not only zeros.")
    return weights
