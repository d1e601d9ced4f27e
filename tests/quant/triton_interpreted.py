"""The GPU kernels against ggml, run on the CPU by Triton's interpreter.

`test_triton_kernels.py` runs this file in a process of its own: TRITON_INTERPRET must be set before triton
is imported and then holds for the whole process. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/quant/triton_interpreted.py
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lichen.errors import TensorError
from lichen.quant import ggml, triton_kernels
from lichen.quant.formats import BLOCKS, GGMLType, row_bytes
from lichen.quant.gguf import GGUFTensor
from lichen.quant.linear import QuantLinear
from lichen.quant.triton_kernels import INTERPRETED_TILE as TILE
from lichen.quant.triton_kernels import SUPPORTED, matmul, matmul_transposed, supports, tile_sizes

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before pytest starts"

TYPES = sorted(SUPPORTED)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6, torch.float32: 0.0}
SCALES = {  # offsets of the fp16 fields of a block
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q6_K: (208,),
}
EXACT = {GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q6_K}  # no sum in the decoding that a compiler could fuse


def raw_blocks(kind: GGMLType, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Any bytes at all, but scales that are finite fp16 numbers of both signs: uint8 [rows, row_bytes]."""
    random = np.random.default_rng(seed)
    stored = random.integers(0, 256, (rows, columns // BLOCKS[kind][0], BLOCKS[kind][1]), dtype=np.uint8)
    for offset in SCALES[kind]:
        scales = random.normal(0, 0.02, stored.shape[:2]).astype("<f2")
        stored[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return torch.from_numpy(stored.reshape(rows, -1))


def dense(kind: GGMLType, stored: torch.Tensor, columns: int) -> torch.Tensor:
    """What ggml makes of the bytes: fp32 [rows, columns]."""
    weights = torch.empty(len(stored), columns)
    ggml.dequantize(kind, stored.numpy(), weights.numpy(), threads=1)
    return weights


def assert_product(result: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """result = left @ right within what rounding allows, in units of |left| @ |right|.

    Rounding the weights and the result to fp16 costs half an epsilon each; to bf16 a whole one, since the
    interpreter cuts the lower bits off where a GPU rounds. A sum in fp32 adds a few of fp32's; 1e-6 is eight.
    Numbers below fp16's normal range are off by up to 2**-25 each.
    """
    assert result.dtype == left.dtype
    left, right = left.double(), right.double()
    size = left.abs() @ right.abs()
    bound = (ROUNDING[result.dtype] + 1e-6) * size + 2.0**-24 * (1 + left.abs().sum(-1, keepdim=True))
    error = (result.double() - left @ right).abs()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.3g} times the tolerance"


def assert_both_products(
    kind: GGMLType, stored: torch.Tensor, columns: int, tokens: int, dtype: torch.dtype
) -> None:
    rows = len(stored)
    weights = dense(kind, stored, columns)
    generator = torch.Generator().manual_seed(rows * columns + tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    dy = torch.randn(tokens, rows, generator=generator).to(dtype)
    assert_product(matmul(x, stored, kind, rows, columns), x, weights.T)
    assert_product(matmul_transposed(dy, stored, kind, rows, columns), dy, weights)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_code_decodes_to_ggmls_number(kind: GGMLType) -> None:
    rows, columns = 32, 256
    stored = raw_blocks(kind, rows, columns, seed=1)
    assert len(np.unique(stored.numpy())) == 256
    weights = dense(kind, stored, columns)
    decoded = matmul_transposed(torch.eye(rows), stored, kind, rows, columns)
    if kind in EXACT:
        assert torch.equal(decoded, weights)
    else:
        torch.testing.assert_close(decoded, weights, rtol=0, atol=float(weights.abs().max()) * 2.0**-22)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_real_weights_quantized_by_ggml(kind: GGMLType) -> None:
    rows, columns = 24, 256
    weights = np.random.default_rng(2).normal(0, 0.05, (rows, columns)).astype(np.float32)
    stored = torch.empty(rows, row_bytes(kind, columns), dtype=torch.uint8)
    ggml.quantize(kind, weights, stored.numpy(), threads=1)
    for dtype in DTYPES:
        assert_both_products(kind, stored, columns, 5, dtype)
    x = torch.randn(20, columns, generator=torch.Generator().manual_seed(3))
    close = matmul(x, stored, kind, rows, columns)
    relative = (close - x @ torch.from_numpy(weights).T).norm() / (x @ torch.from_numpy(weights).T).norm()
    assert 1e-4 < float(relative) < 0.12  # four bits lose a little, and no more


@settings(max_examples=16, deadline=None, database=None, derandomize=True)
@given(
    kind=st.sampled_from(TYPES),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, TILE.tokens + 1),
    rows=st.integers(1, TILE.across + 1),
    blocks=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
@example(GGMLType.Q4_0, torch.float32, 1, 1, 1, 0)  # one number in, one out, one block
@example(GGMLType.Q6_K, torch.float16, TILE.tokens, TILE.across, 1, 0)  # whole tiles
@example(GGMLType.Q4_K, torch.bfloat16, TILE.tokens + 1, TILE.across + 1, 2, 0)  # one past them
@example(GGMLType.Q4_1, torch.float32, TILE.tokens - 1, TILE.across - 1, 3, 0)
def test_products_of_any_shape(
    kind: GGMLType, dtype: torch.dtype, tokens: int, rows: int, blocks: int, seed: int
) -> None:
    columns = blocks * BLOCKS[kind][0]
    assert_both_products(kind, raw_blocks(kind, rows, columns, seed), columns, tokens, dtype)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_zero_blocks_and_negative_scales(kind: GGMLType) -> None:
    rows, columns = 6, 2 * BLOCKS[kind][0]
    stored = raw_blocks(kind, rows, columns, seed=4).view(rows, -1, BLOCKS[kind][1])
    stored[::2, 0] = 0
    for offset in SCALES[kind]:
        stored[1::2, :, offset + 1] |= 0x80  # the sign of a little-endian fp16
    flat = stored.view(rows, -1)
    decoded = matmul_transposed(torch.eye(rows), flat, kind, rows, columns)
    assert not decoded[::2, : BLOCKS[kind][0]].any()
    assert_both_products(kind, flat, columns, 3, torch.float32)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [6e-8, -6e-8, 65504.0])
def test_smallest_and_largest_scales(kind: GGMLType, scale: float) -> None:
    rows, columns = 3, 256
    stored = raw_blocks(kind, rows, columns, seed=5).view(rows, -1, BLOCKS[kind][1])
    field = torch.from_numpy(np.array([scale], dtype="<f2").view(np.uint8))
    for offset in SCALES[kind]:
        stored[..., offset : offset + 2] = field
    weights = dense(kind, stored.view(rows, -1), columns)
    decoded = matmul_transposed(torch.eye(rows), stored.view(rows, -1), kind, rows, columns)
    assert weights.any()
    torch.testing.assert_close(decoded, weights, rtol=2.0**-22, atol=float(weights.abs().max()) * 2.0**-22)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_nothing_outside_the_rows_counts(kind: GGMLType) -> None:
    """Rows in the midst of 0xff bytes, inputs and gradients in the midst of nans: the result stays finite."""
    rows, columns, tokens = 5, BLOCKS[kind][0], 3
    size = row_bytes(kind, columns)
    around = torch.full((3 * rows, size), 0xFF, dtype=torch.uint8)
    around[rows : 2 * rows] = raw_blocks(kind, rows, columns, seed=6)
    stored = around[rows : 2 * rows]
    weights = dense(kind, stored, columns)
    for product, last, right in ((matmul, columns, weights.T), (matmul_transposed, rows, weights)):
        inputs = torch.full((3 * tokens, last), float("nan"))
        inputs[tokens : 2 * tokens] = torch.linspace(-1, 1, tokens * last).view(tokens, last)
        left = inputs[tokens : 2 * tokens]
        assert_product(product(left, stored, kind, rows, columns), left, right)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_outside_the_result_is_written(direction: str) -> None:
    """The kernels alone, on parts of one tile, with a result in the midst of sevens."""
    from lichen.quant import triton_tiles

    rows, columns, tokens = 5, 32, 3
    stored = raw_blocks(GGMLType.Q4_0, rows, columns, seed=10)
    summed, across = (columns, rows) if direction == "forward" else (rows, columns)
    around = torch.full((3, tokens, across), 7.0)
    sizes = (tokens, rows, columns, stored.shape[1])
    kernel = getattr(triton_tiles, direction)[(1, 1)]
    constants = {"DECODE": triton_tiles.decode_q4_0, "WIDE": True, **tile_sizes(direction, TILE)}
    kernel(torch.ones(tokens, summed), stored, around[1], *sizes, **constants)
    weights = dense(GGMLType.Q4_0, stored, columns)
    right = weights.T if direction == "forward" else weights
    assert_product(around[1], torch.ones(tokens, summed), right)
    assert bool((around[::2] == 7).all())


def test_scales_may_lie_on_any_even_address_and_on_no_odd_one() -> None:
    kind, rows, columns = GGMLType.Q4_0, 4, 96
    stored = raw_blocks(kind, rows, columns, seed=7)
    for shift in (2, 6):
        buffer = torch.zeros(stored.numel() + shift, dtype=torch.uint8)
        moved = buffer[shift:].view_as(stored).copy_(stored)
        assert_both_products(kind, moved, columns, 2, torch.float32)
    odd = torch.zeros(stored.numel() + 1, dtype=torch.uint8)[1:].view_as(stored)
    with pytest.raises(TensorError, match="odd address"):
        matmul(torch.zeros(1, columns), odd, kind, rows, columns)


def test_leading_axes_strides_and_no_tokens_at_all() -> None:
    kind, rows, columns = GGMLType.Q8_0, 7, 64
    stored = raw_blocks(kind, rows, columns, seed=8)
    weights = dense(kind, stored, columns)
    x = torch.randn(columns, 3, 2, generator=torch.Generator().manual_seed(9)).permute(2, 1, 0)
    assert_product(matmul(x, stored, kind, rows, columns), x, weights.T)
    dy = torch.ones(1, 1).expand(4, rows)  # the gradient that a plain sum sends back
    assert_product(matmul_transposed(dy, stored, kind, rows, columns), dy, weights)
    assert matmul(torch.ones(columns), stored, kind, rows, columns).shape == (rows,)
    assert matmul(torch.zeros(2, 0, columns), stored, kind, rows, columns).shape == (2, 0, rows)
    assert matmul_transposed(torch.zeros(0, rows), stored, kind, rows, columns).shape == (0, columns)


def counted(product: Callable[..., torch.Tensor], calls: list[str]) -> Callable[..., torch.Tensor]:
    """The same product, which writes its name down."""

    @functools.wraps(product)
    def call(*given: Any) -> torch.Tensor:
        calls.append(product.__name__)
        return product(*given)

    return call


@pytest.mark.parametrize("kind", [*TYPES, GGMLType.Q5_0], ids=lambda kind: kind.name)
def test_a_layer_takes_the_kernels_where_they_serve(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and the gradient of the input, beside a dense layer; types without kernels go through ggml."""
    rows, columns = 9, 256
    numbers = np.random.default_rng(11).normal(0, 0.05, (2, rows, columns)).astype(np.float32)
    tensors = []
    for part in numbers:
        stored = np.empty((rows, row_bytes(kind, columns)), np.uint8)
        ggml.quantize(kind, part, stored, threads=1)
        stored.setflags(write=False)  # as a mapped file's
        tensors.append(GGUFTensor("w", kind, (rows, columns), stored))
    calls: list[str] = []
    for name in ("matmul", "matmul_transposed"):
        monkeypatch.setattr(triton_kernels, name, counted(getattr(triton_kernels, name), calls))
    bias = torch.linspace(-1, 1, rows)
    layer = QuantLinear(tensors[0], bias)
    for tensor in (*tensors, tensors[0]):  # measurements exchange a layer's tensor
        layer.tensor = tensor
        x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1), requires_grad=True)
        weights = layer.dequantize()
        expected = torch.nn.functional.linear(x, weights, bias)
        gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        out = layer(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        (found,) = torch.autograd.grad(out, x, gradient)
        torch.testing.assert_close(found, gradient @ weights, rtol=1e-4, atol=1e-5)
    assert calls == (["matmul", "matmul_transposed"] * 3 if kind in SUPPORTED else [])
    some = torch.tensor([3, 0])
    torch.testing.assert_close(layer(x, some), expected[..., some], rtol=1e-4, atol=1e-5)


def test_the_interpreter_makes_the_cpu_a_device() -> None:
    assert all(supports(kind, torch.device("cpu")) for kind in TYPES)
    assert not supports(GGMLType.Q5_0, torch.device("cpu"))
