"""Conversions beside ggml called plainly, beside the independent numpy version of `gguf`, and under abuse."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.errors import ModelFileError, TensorError
from lichen.quant import ggml
from lichen.quant.ggml import (
    DEQUANTIZABLE,
    NEEDS_IMPORTANCE,
    QUANTIZABLE,
    GGMLType,
    block_size,
    check_rows,
    dequantize,
    quantize,
    row_bytes,
)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BOTH = sorted(DEQUANTIZABLE & QUANTIZABLE)
QUICK = [kind for kind in BOTH if not kind.name.startswith(("IQ1", "IQ2", "IQ3"))]  # those take milliseconds
COLUMNS, ROWS = 512, 9

# ggml takes seconds to make the tables of these
_SLOW_TABLES = {GGMLType.IQ1_S, GGMLType.IQ1_M, GGMLType.IQ2_S, GGMLType.IQ2_XS}
EACH = [
    pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] if kind in _SLOW_TABLES else [])
    for kind in BOTH
]


def numbers(rows: int = ROWS, columns: int = COLUMNS, seed: int = 1) -> Floats:
    chance = np.random.default_rng(seed)
    values = chance.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.05)
    values[0] = 0
    return values


def weights(columns: int = COLUMNS) -> Floats:
    return np.random.default_rng(2).random(columns, dtype=np.float32) + np.float32(0.1)


def stored(kind: GGMLType, source: Floats, importance: Floats | None = None, threads: int = 2) -> Bytes:
    out = np.empty((len(source), row_bytes(kind, source.shape[1])), np.uint8)
    quantize(kind, source, out, importance, threads)
    return out


@pytest.fixture(scope="module")
def plain() -> ctypes.CDLL:
    """ggml once more, with declarations of our own: what a plain caller in C would do."""
    library = ctypes.CDLL(str(ggml._library_path()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    )  # fmt: skip
    return library


# ---- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EACH)
def test_conversions_have_the_bits_of_ggml(
    kind: GGMLType, plain: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "PIECE", 1024)  # many pieces, the last one not full
    source = numbers()
    for importance in (None, weights()):
        if importance is None and kind in NEEDS_IMPORTANCE:
            continue
        ours = stored(kind, source, importance, threads=3)
        theirs = np.empty_like(ours)
        pointer = None if importance is None else importance.ctypes.data
        plain.ggml_quantize_chunk(kind, source.ctypes.data, theirs.ctypes.data, 0, ROWS, COLUMNS, pointer)
        assert np.array_equal(ours, theirs)
        back = np.empty_like(source)
        dequantize(kind, ours, back, threads=3)
        assert np.array_equal(back.view(np.uint32), plainly_dequantized(plain, kind, theirs).view(np.uint32))


def plainly_dequantized(library: ctypes.CDLL, kind: GGMLType, data: Bytes) -> Floats:
    if kind is GGMLType.F32:
        return data.view(np.float32)
    name = {GGMLType.F16: "ggml_fp16_to_fp32_row", GGMLType.BF16: "ggml_bf16_to_fp32_row"}.get(
        kind, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}"
    )
    function = getattr(library, name)
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    out = np.empty((ROWS, COLUMNS), np.float32)
    function(data.ctypes.data, out.ctypes.data, out.size)
    return out


@pytest.mark.parametrize("kind", EACH)
def test_dequantizing_has_the_bits_of_the_numpy_version(kind: GGMLType) -> None:
    source = numbers()
    data = stored(kind, source, weights())
    try:
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType(int(kind)))
    except (NotImplementedError, ValueError):
        pytest.skip(f"gguf has no {kind.name}")
    out = np.empty_like(source)
    dequantize(kind, data, out)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("kind", EACH)
def test_quantizing_has_the_bits_of_the_numpy_version(kind: GGMLType) -> None:
    source = numbers()
    try:
        expected = gguf.quantize(source, gguf.GGMLQuantizationType(int(kind)))
    except (NotImplementedError, ValueError):
        pytest.skip(f"gguf cannot quantize to {kind.name}")
    assert np.array_equal(stored(kind, source), expected.view(np.uint8))


@pytest.mark.parametrize("kind", sorted(DEQUANTIZABLE), ids=lambda kind: kind.name)
def test_any_bytes_dequantize_to_the_bits_of_the_numpy_version(kind: GGMLType) -> None:
    """Every pattern of bits, not only those that a quantizer makes; any nan equals any other."""
    size = row_bytes(kind, block_size(kind))
    data = np.random.default_rng(int(kind)).integers(0, 256, (3, 64 * size), np.uint8)
    out = np.empty((3, 64 * block_size(kind)), np.float32)
    dequantize(kind, data, out, threads=2)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(data, gguf.GGMLQuantizationType(int(kind)))
    except (NotImplementedError, ValueError):
        pytest.skip(f"gguf has no {kind.name}")
    assert np.array_equal(out, expected, equal_nan=True)


def test_the_default_models_tensors_have_the_bits_of_the_numpy_version(model_path: Any) -> None:
    from lichen.quant.gguf import open_gguf

    with open_gguf(model_path) as file:
        for tensor in itertools.islice(file.tensors.values(), 1, 12):
            out = np.empty(tensor.shape, np.float32)
            dequantize(tensor.type, tensor.data, out)
            check_rows(tensor.type, tensor.data)
            kind = gguf.GGMLQuantizationType(int(tensor.type))
            assert np.array_equal(out, gguf.dequantize(tensor.data, kind).reshape(tensor.shape))


def test_an_activation_type_is_quantized_as_by_ggml(plain: ctypes.CDLL) -> None:
    source = numbers()
    theirs = np.empty((ROWS, row_bytes(GGMLType.Q8_1, COLUMNS)), np.uint8)
    plain.quantize_row_q8_1_ref(
        ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(theirs.ctypes.data), ctypes.c_int64(source.size)
    )
    assert np.array_equal(stored(GGMLType.Q8_1, source), theirs)


# ---- properties -----------------------------------------------------------------------------------

EDGES = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38, 6e-8, 1e-4, 3.0, -127.0, 60000.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_edge_value_comes_back_near_and_the_same_for_any_threads(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(QUICK))
    columns = block_size(kind) * data.draw(st.integers(1, 3))
    shape = (*data.draw(st.lists(st.integers(1, 3), max_size=2)), columns)
    chance = np.random.default_rng(data.draw(st.integers(0, 99)))
    source = chance.standard_normal(shape).astype(np.float32)
    for _ in range(data.draw(st.integers(0, 4))):
        source.reshape(-1)[data.draw(st.integers(0, source.size - 1))] = data.draw(st.sampled_from(EDGES))
    if data.draw(st.booleans()):
        source.reshape(-1)[: block_size(kind)] = 0
    size = source.size // columns * row_bytes(kind, columns)
    one, many = bytearray(size), np.empty(size, np.uint8)
    quantize(kind, source, one, threads=1)
    quantize(kind, source, many, threads=5)
    assert many.tobytes() == bytes(one)
    check_rows(kind, one)
    out = np.empty_like(source)
    dequantize(kind, memoryview(one).toreadonly(), out)
    assert np.isfinite(out).all()
    # a zero block stays zero, but where a type has no zero
    if not source.any() and kind is not GGMLType.Q1_0:
        assert not out.any()
    if kind in (GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0):
        assert np.allclose(out, source, rtol=1e-2, atol=np.abs(source).max() / 120)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_inf_and_nan_are_refused_by_their_row(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(QUICK))
    source = numbers(rows=data.draw(st.integers(1, 9)), columns=256)
    row = data.draw(st.integers(0, len(source) - 1))
    source[row, data.draw(st.integers(0, 255))] = data.draw(st.sampled_from([np.inf, -np.inf, np.nan]))
    with pytest.raises(TensorError, match=f"Row {row} cannot be quantized"):
        stored(kind, source)


def test_numbers_too_large_for_a_scale_are_refused_by_their_row() -> None:
    source = numbers()
    source[4, 7] = 1e30
    for kind in (GGMLType.F16, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q8_0):
        with pytest.raises(TensorError, match="Row 4 does not fit"):
            stored(kind, source)
    stored(GGMLType.F32, source)
    stored(GGMLType.BF16, source)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DEQUANTIZABLE)), st.binary(min_size=292, max_size=292), st.integers(1, 4))
def test_any_bytes_are_read_without_harm(kind: GGMLType, noise: bytes, blocks: int) -> None:
    """Rows of a hostile file: numbers come out, perhaps not finite, and `check_rows` says when not."""
    size = row_bytes(kind, block_size(kind))
    data = (noise * 8)[: blocks * size]
    out = np.empty(blocks * block_size(kind), np.float32)
    dequantize(kind, data, out)


def test_scales_of_nan_are_found_by_their_row() -> None:
    source = numbers()
    for kind in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.F16, GGMLType.BF16):
        data = stored(kind, source)
        check_rows(kind, data)
        at = {GGMLType.F16: 2, GGMLType.BF16: 2}.get(kind, 0)
        data[3, at : at + 2] = (0xFF, 0x7F)  # nan as F16 and as BF16, little endian
        with pytest.raises(ModelFileError, match=f"Row 3 of a tensor stored as {kind.name}"):
            check_rows(kind, data)


# ---- what is refused ------------------------------------------------------------------------------


def test_buffers_that_do_not_fit_are_refused() -> None:
    source = numbers()
    good = np.empty((ROWS, row_bytes(GGMLType.Q4_0, COLUMNS)), np.uint8)
    frozen = good.copy()
    frozen.setflags(write=False)
    cases: list[tuple[str, Any, Any, str]] = [
        ("too small", source, good[:-1], "but the buffer has"),
        ("too large", source, np.empty(good.nbytes + 1, np.uint8), "but the buffer has"),
        ("columns", source[:, :500].copy(), good, "blocks of 32"),
        ("doubles", source.astype(np.float64), good, "must hold aligned float32"),
        ("a list", source.tolist(), good, "no buffer"),
        ("bytes for numbers", source.tobytes(), good, "must hold aligned float32"),
        ("strided", source[:, ::2], good, "not contiguous"),
        ("read-only", source, frozen, "read-only"),
        ("misaligned", np.frombuffer(bytearray(4097), np.float32, 1024, 1), good, "must hold aligned"),
    ]
    for name, numbers_, out, words in cases:
        with pytest.raises(TensorError, match=words):
            quantize(GGMLType.Q4_0, numbers_, out)
            pytest.fail(f"{name} was taken")
    with pytest.raises(TensorError, match="but the buffer has"):
        dequantize(GGMLType.Q4_0, good[:-1], np.empty_like(source))
    with pytest.raises(TensorError, match="read-only"):
        dequantize(GGMLType.Q4_0, good, bytes(source.nbytes))


def test_types_that_cannot_be_converted_are_refused() -> None:
    out = np.empty(256, np.float32)
    for number in (4, 31, 43, 99, -1):
        with pytest.raises(TensorError, match="no tensor type"):
            dequantize(number, bytes(256), out)  # type: ignore[arg-type]  # as it comes from a file
        with pytest.raises(TensorError, match="no tensor type"):
            block_size(number)
    for kind in set(GGMLType) - DEQUANTIZABLE:
        with pytest.raises(TensorError, match="cannot be dequantized"):
            dequantize(kind, bytes(row_bytes(kind, 256)), out)
    for kind in set(GGMLType) - QUANTIZABLE:
        with pytest.raises(TensorError, match="cannot be quantized"):
            quantize(kind, out, bytearray(row_bytes(kind, 256)))
    with pytest.raises(TensorError, match="whole number of blocks"):
        check_rows(GGMLType.Q4_0, bytes(19))


def test_importance_is_demanded_and_checked() -> None:
    source = numbers()
    for kind in NEEDS_IMPORTANCE:
        with pytest.raises(TensorError, match="needs an importance"):
            stored(kind, source)
    bad = weights()
    bad[3] = np.nan
    negative = weights()
    negative[3] = -1
    for importance, words in (
        (weights()[:-1].copy(), "shape"),
        (bad, "finite"),
        (negative, "finite numbers from 0 up"),
        (np.zeros(COLUMNS, np.float32), "only zeros"),
    ):
        with pytest.raises(TensorError, match=words):
            stored(GGMLType.Q4_K, source, importance)


CHILD = """
import sys
import numpy as np
from lichen.errors import TensorError
from lichen.quant.ggml import NEEDS_IMPORTANCE, GGMLType, quantize, row_bytes

chance = np.random.default_rng(0)
normal = chance.standard_normal((2, 256))
inputs = [np.full((2, 256), number) for number in (3.4e38, 1e-45, 0.3)] + [np.eye(2, 256, 7) * 1e38]
inputs += [normal * 10.0**power for power in (-44, -30, -20, -15, -10, -7, -5, 4, 5, 15, 19, 30)]
inputs += [normal * 10.0 ** chance.uniform(-44, 4, (2, 256)), np.repeat(normal[:, :8] * [[1], [1e-9]], 32, 1)]
weights = [None, np.ones(256), np.eye(1, 256, 5)[0], np.full(256, 3e38), np.full(256, 1e-45)]
weights += [np.repeat([0.0, 1.0], 128), chance.random(256) * 1e20, 10.0 ** chance.uniform(-12, 3, 256)]
refused = done = 0
for kind in (GGMLType[name] for name in sys.argv[1:]):
    for number, (source, weight) in enumerate((s, w) for s in inputs for w in weights):
        print(kind.name, number, flush=True)
        if weight is None and kind in NEEDS_IMPORTANCE:
            continue
        out = np.empty((2, row_bytes(kind, 256)), np.uint8)
        importance = None if weight is None else weight.astype(np.float32)
        try:
            quantize(kind, source.astype(np.float32), out, importance, threads=1)
            done += 1
        except TensorError:
            refused += 1
print("end", refused, done)
"""


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([GGMLType.IQ2_XXS, GGMLType.IQ3_XXS, GGMLType.Q4_0, GGMLType.Q4_K], id="some"),
        pytest.param(sorted(QUANTIZABLE), id="all", marks=pytest.mark.slow),
    ],
)
def test_no_finite_number_and_no_importance_ends_the_process(kinds: list[GGMLType]) -> None:
    """ggml's searches for grid points end the process when their sums overflow or vanish."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *(kind.name for kind in kinds)],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    last = run.stdout.splitlines()[-1].split()
    assert last[0] == "end", f"{last} ended the process: {run.stderr[-300:]}"
    assert int(last[1]) > 100
    assert int(last[2]) > 100
