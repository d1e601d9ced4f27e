"""The quantized layers against dense ones, for every type, with every way to call them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lichen.errors import TensorError
from lichen.quant import ggml, linear
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor
from lichen.quant.linear import QuantEmbedding, QuantLinear

COLUMNS = 512


@functools.cache
def stored(kind: GGMLType, rows: int = 40, columns: int = COLUMNS) -> GGUFTensor:
    """A random matrix of that type, read-only as in a mapped file."""
    source = np.random.default_rng(0)
    if kind.name.startswith("IQ"):  # these take seconds to quantize; any bits with a finite scale will do
        bits = source.integers(0, 256, (4 * rows, ggml.row_bytes(kind, columns)), np.uint8)
        numbers = np.empty((4 * rows, columns), np.float32)
        ggml.dequantize(kind, bits, numbers)
        data = bits[np.isfinite(numbers).all(axis=1)][:rows].copy()
    else:
        values = source.standard_normal((rows, columns)).astype(np.float32)
        data = np.empty((rows, ggml.row_bytes(kind, columns)), np.uint8)
        ggml.quantize(kind, values, data)
    assert len(data) == rows
    data.flags.writeable = False
    return GGUFTensor(f"{kind.name}.weight", kind, (rows, columns), data)


def dense(tensor: GGUFTensor) -> Tensor:
    out = torch.empty(tensor.shape)
    ggml.dequantize(tensor.type, tensor.data, out.numpy())
    return out


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.fixture(params=[1 << 20, COLUMNS * 16, 1], ids=["whole", "tiles", "rows"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(linear, "TILE", request.param)
    return int(request.param)


@pytest.mark.parametrize("kind", sorted(ggml.DEQUANTIZABLE), ids=lambda kind: kind.name)
def test_every_type_equals_a_dense_layer(kind: GGMLType, tile: int) -> None:
    tensor = stored(kind)
    bias = torch.linspace(-1, 1, 40)
    layer, weight = QuantLinear(tensor, bias), dense(tensor)
    x = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(2))
    out = layer(x)
    torch.autograd.backward(out, y)
    assert x.grad is not None
    expected_x = x.detach().requires_grad_()
    expected = nn.functional.linear(expected_x, weight, bias)
    torch.autograd.backward(expected, y)
    assert expected_x.grad is not None
    assert relative(out, expected) < 1e-5
    assert relative(x.grad, expected_x.grad) < 1e-4


def test_some_rows(tile: int) -> None:
    tensor = stored(GGMLType.Q4_1)
    bias = torch.linspace(-1, 1, 40)
    rows = torch.tensor([3, 39, 3, 0])
    x = torch.randn(5, COLUMNS, requires_grad=True)
    layer = QuantLinear(tensor, bias)
    out = layer(x, rows)
    assert torch.allclose(out, layer(x)[:, rows], rtol=1e-5, atol=1e-5)
    torch.autograd.backward(out.sum())
    assert x.grad is not None
    assert relative(x.grad, dense(tensor)[rows].sum(0).expand(5, -1)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_input_decides_the_dtype(dtype: torch.dtype, tile: int) -> None:
    tensor = stored(GGMLType.Q8_0)
    x = torch.randn(4, COLUMNS).to(dtype).requires_grad_()
    out = QuantLinear(tensor)(x)
    assert out.dtype == dtype
    assert relative(out.float(), x.detach().float() @ dense(tensor).to(dtype).float().T) < 2e-2
    torch.autograd.backward(out.sum())
    assert x.grad is not None and x.grad.dtype == dtype


def test_autocast_is_not_followed() -> None:
    layer, x = QuantLinear(stored(GGMLType.Q4_0)), torch.randn(4, COLUMNS, requires_grad=True)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        torch.autograd.backward(out.sum())
    assert out.dtype == torch.float32
    assert torch.equal(out, plain)


def test_weights_take_no_part_in_training() -> None:
    layer = QuantLinear(stored(GGMLType.Q4_0))
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert not layer(torch.randn(2, COLUMNS)).requires_grad


def test_the_buffer_is_kept() -> None:
    layer, x = QuantLinear(stored(GGMLType.Q4_0)), torch.randn(4, COLUMNS)
    layer(x)
    before = linear._kept.buffers[torch.float32].data_ptr()
    for _ in range(3):
        layer(x)
    assert linear._kept.buffers[torch.float32].data_ptr() == before


def test_a_dense_copy_trains() -> None:
    quantized = QuantLinear(stored(GGMLType.Q8_0), torch.ones(40))
    layer, x = quantized.dense(), torch.randn(4, COLUMNS)
    assert torch.allclose(layer(x), quantized(x), atol=1e-4)
    torch.autograd.backward(layer(x).sum())
    assert layer.weight.grad is not None


def test_no_tokens() -> None:
    assert QuantLinear(stored(GGMLType.Q4_0))(torch.empty(0, COLUMNS)).shape == (0, 40)
    assert QuantEmbedding(stored(GGMLType.Q4_0))(torch.empty(0, dtype=torch.int64)).shape == (0, COLUMNS)


def test_embedding_looks_up_rows() -> None:
    tensor = stored(GGMLType.Q6_K)
    tokens = torch.tensor([[5, 0, 39], [5, 5, 1]])
    table = QuantEmbedding(tensor)
    assert torch.equal(table(tokens), dense(tensor)[tokens])
    assert torch.equal(table.dense()(tokens), dense(tensor)[tokens])


@pytest.mark.parametrize("token", [-1, 40])
def test_rows_outside_are_refused(token: int) -> None:
    tensor = stored(GGMLType.Q4_0)
    with pytest.raises(TensorError, match="rows 0 to 39"):
        QuantEmbedding(tensor)(torch.tensor([token]))
    with pytest.raises(TensorError, match="rows 0 to 39"):
        QuantLinear(tensor)(torch.randn(1, COLUMNS), torch.tensor([token]))


def test_wrong_inputs_are_refused() -> None:
    layer = QuantLinear(stored(GGMLType.Q4_0))
    with pytest.raises(TensorError, match=r"not torch\.float64"):
        layer(torch.randn(2, COLUMNS, dtype=torch.float64))
    with pytest.raises(TensorError, match=f"takes {COLUMNS} features, but the input has 3"):
        layer(torch.randn(2, 3))
    with pytest.raises(TensorError, match="whole numbers"):
        layer(torch.randn(2, COLUMNS), torch.tensor([0.5]))
    with pytest.raises(TensorError, match=r"bias of .* has the shape \[3\], not \[40\]"):
        QuantLinear(stored(GGMLType.Q4_0), torch.ones(3))


def test_what_is_no_matrix_of_floats_is_refused() -> None:
    vector = GGUFTensor("v", GGMLType.F32, (8,), np.zeros((1, 32), np.uint8))
    whole = GGUFTensor("w", GGMLType.I32, (2, 8), np.zeros((2, 32), np.uint8))
    with pytest.raises(TensorError, match="needs a matrix"):
        QuantLinear(vector)
    with pytest.raises(TensorError, match="I32, which cannot be dequantized"):
        QuantEmbedding(whole)
