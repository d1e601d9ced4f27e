"""Torch layers over a model file's own bytes: quantized, mapped, frozen.

The weights stay the read-only bytes of the mapped file, shared by every process that maps it. A product
dequantizes a tile of rows into a buffer that the thread keeps, multiplies from there while the tile is
in the cache, and goes on; the gradient for the input dequantizes again. So a layer costs no memory of
its own, and nothing of the weights is kept between forward and backward. On a GPU that `triton_kernels.py`
serves, a copy of the bytes lies on the card, and its kernels multiply by them as they are.

Dtypes: the dtype of the input decides. float32 is multiplied in float32, what ggml's dequantization
gives; bfloat16 and float16 round each tile to that dtype first. An active autocast is not followed: on
a CPU without bfloat16 units it makes training 25 times slower.
Not covered: gradients for the weights (make a layer trainable with `dense`), second derivatives.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lichen.errors import TensorError
from lichen.quant import ggml, triton_kernels
from lichen.quant.gguf import GGUFTensor

# float32 elements of a tile: 4 MB. bench/layers.py shows no difference from 1 MB to whole matrices beyond the
# noise of the machine, and up to twice the time at 256 kB; this bounds the buffer for large vocabularies.
TILE = 1 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_kept = threading.local()  # a buffer a dtype, as large as the largest tile that the thread has seen


def _buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """This thread's buffer: [elements], contents undefined."""
    buffers: dict[torch.dtype, Tensor] = _kept.__dict__.setdefault("buffers", {})
    buffer = buffers.get(dtype)
    if buffer is None or len(buffer) < elements:
        buffer = buffers[dtype] = torch.empty(elements, dtype=dtype)
    return buffer[:elements]


def _dequantized(kind: ggml.GGMLType, rows: Any, out: Tensor) -> Tensor:
    """Stored rows, uint8 [rows, row_bytes], as float32 in `out` [rows, columns]."""
    ggml.dequantize(kind, rows, out.numpy(), threads=torch.get_num_threads())
    return out


def _tiles(tensor: GGUFTensor, rows: Any | None, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last + 1, weights [rows, columns]) of each tile, in the dtype and on the device of `like`.

    A tile is valid until the next one is asked for. rows: numpy int64, or None for all of them.
    """
    columns = tensor.shape[1]
    count = tensor.shape[0] if rows is None else len(rows)
    step = max(1, min(count, TILE // columns))
    for first in range(0, count, step):
        last = min(count, first + step)
        stored = tensor.data[first:last] if rows is None else tensor.data[rows[first:last]]
        whole = _buffer((last - first) * columns, torch.float32).view(-1, columns)
        tile = _dequantized(tensor.type, stored, whole)
        if like.device.type != "cpu":
            tile = tile.to(like.device, like.dtype)
        elif like.dtype != torch.float32:
            tile = _buffer(tile.numel(), like.dtype).view(-1, columns).copy_(tile)
        yield first, last, tile


def _without_autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _Product(torch.autograd.Function):
    """x [tokens, columns] times the transposed weights: [tokens, rows]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: GGUFTensor, rows: Any | None) -> Tensor:
        ctx.tensor, ctx.rows = tensor, rows
        count = tensor.shape[0] if rows is None else len(rows)
        out = x.new_empty(len(x), count)
        with _without_autocast(x):
            for first, last, tile in _tiles(tensor, rows, x):
                torch.mm(x, tile.t(), out=out[:, first:last])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients  # [tokens, rows]
        out: Tensor = gradient.new_empty(len(gradient), ctx.tensor.shape[1])
        with torch.no_grad(), _without_autocast(gradient):
            for first, last, tile in _tiles(ctx.tensor, ctx.rows, gradient):
                torch.addmm(out, gradient[:, first:last], tile, beta=int(first > 0), out=out)
        return out, None, None


class _FusedProduct(torch.autograd.Function):
    """The same, by kernels that decode the bytes themselves. stored: uint8 [rows, row_bytes], beside x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, kind: ggml.GGMLType) -> Tensor:
        ctx.stored, ctx.kind, ctx.sizes = stored, kind, (len(stored), x.shape[1])
        return triton_kernels.matmul(x, stored, kind, *ctx.sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients  # [tokens, rows]
        return triton_kernels.matmul_transposed(gradient, ctx.stored, ctx.kind, *ctx.sizes), None, None


@functools.cache
def _fused(kind: ggml.GGMLType, device: torch.device) -> bool:
    return triton_kernels.supports(kind, device)


def _matrix(tensor: GGUFTensor) -> GGUFTensor:
    if len(tensor.shape) != 2:
        raise TensorError(f"{tensor.name} has the shape {list(tensor.shape)}, but a layer needs a matrix.")
    if tensor.type not in ggml.DEQUANTIZABLE:
        raise TensorError(f"{tensor.name} is stored as {tensor.type.name}, which cannot be dequantized.")
    return tensor


def _row_numbers(rows: Tensor, tensor: GGUFTensor) -> Any:
    """Row numbers as flat numpy int64. Raises TensorError when one is outside the tensor."""
    if rows.dtype not in (torch.int64, torch.int32):
        raise TensorError(f"Row numbers of {tensor.name} must be whole numbers, not {rows.dtype}.")
    numbers = rows.detach().reshape(-1).cpu().numpy()
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= tensor.shape[0]):
        raise TensorError(
            f"{tensor.name} has rows 0 to {tensor.shape[0] - 1}, "
            f"but rows {numbers.min()} to {numbers.max()} were asked for."
        )
    return numbers


class QuantLinear(nn.Module):
    """y = x W^T + b over a stored W [out_features, in_features]; the gradient reaches x alone.

    bias: float32 [out_features], or None. Raises TensorError for a type that cannot be dequantized.
    """

    bias: Tensor | None

    def __init__(self, tensor: GGUFTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.tensor = _matrix(tensor)
        self.out_features, self.in_features = tensor.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise TensorError(
                f"The bias of {tensor.name} has the shape {list(bias.shape)}, not [{self.out_features}]."
            )
        self.register_buffer("bias", bias, persistent=False)
        self._resident: tuple[GGUFTensor, Tensor] | None = None

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [..., in_features] to [..., out_features], or to [..., len(rows)] for some of the rows.

        Raises TensorError for a dtype that is not float32, bfloat16 or float16.
        """
        if x.dtype not in FLOATS:
            raise TensorError(f"{self.tensor.name} multiplies float32, bfloat16 or float16, not {x.dtype}.")
        if x.shape[-1] != self.in_features:
            raise TensorError(
                f"{self.tensor.name} takes {self.in_features} features, but the input has {x.shape[-1]}."
            )
        numbers = None if rows is None else _row_numbers(rows, self.tensor)
        flat = x.reshape(-1, self.in_features)
        y: Tensor
        if numbers is None and _fused(self.tensor.type, x.device):
            stored = self._bytes_on(x.device)
            y = _FusedProduct.apply(flat, stored, self.tensor.type)  # type: ignore[no-untyped-call]
        else:
            y = _Product.apply(flat, self.tensor, numbers)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            bias = self.bias if rows is None else self.bias[rows.reshape(-1)]
            # y is fresh and its own values are needed by no gradient, so the sum may take its place
            y = y.add_(bias.to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _bytes_on(self, device: torch.device) -> Tensor:
        """The stored bytes there, copied once: uint8 [out_features, row_bytes]."""
        if (
            self._resident is None
            or self._resident[0] is not self.tensor
            or self._resident[1].device != device
        ):
            self._resident = self.tensor, torch.from_numpy(self.tensor.data.copy()).to(device)
        return self._resident[1]

    def dequantize(self) -> Tensor:
        """The weights as a new float32 tensor [out_features, in_features]."""
        out = torch.empty(self.out_features, self.in_features)
        return _dequantized(self.tensor.type, self.tensor.data, out)

    def dense(self) -> nn.Linear:
        """A trainable copy: an ordinary layer with the same weights in float32."""
        with torch.device("meta"):  # no random weights, which would move the caller's random numbers on
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight = nn.Parameter(self.dequantize())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        size = f"{self.in_features}, {self.out_features}"
        return f"{size}, {self.tensor.type.name}, bias={self.bias is not None}"


class QuantEmbedding(nn.Module):
    """Looks rows up in a stored table [rows, width]; only the rows asked for are dequantized."""

    def __init__(self, tensor: GGUFTensor) -> None:
        super().__init__()
        self.tensor = _matrix(tensor)
        self.num_embeddings, self.embedding_dim = tensor.shape

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] to float32 [..., width]. Raises TensorError for one outside the table."""
        numbers = _row_numbers(tokens, self.tensor)
        out = torch.empty(len(numbers), self.embedding_dim)
        if len(numbers):
            _dequantized(self.tensor.type, self.tensor.data[numbers], out)
        return out.view(*tokens.shape, self.embedding_dim).to(tokens.device)

    def dense(self) -> nn.Embedding:
        """A trainable copy: an ordinary layer with the same table in float32."""
        table = torch.empty(self.num_embeddings, self.embedding_dim)
        _dequantized(self.tensor.type, self.tensor.data, table)
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=table)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.tensor.type.name}"
