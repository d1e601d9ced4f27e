"""Matrix products over quantized weights on a GPU: the weights stay in the file's bytes, 4 to 8 bits each.

Two products are all that LoRA training over a frozen model asks for: the forward one and the gradient of its
input. Weights are decoded in fp32, rounded to the type of the other factor, multiplied, and summed in fp32
(`triton_tiles.py`); no decoded copy ever lies in GPU memory. So fp32 inputs give what ggml's dequantization
and a float32 product give, up to the order of the sum, and fp16 and bf16 inputs what a dense matrix in their
own type gives. A weight past 65,504, which fp16 cannot hold, becomes infinite there.

`supports` says whether this path serves a tensor. With TRITON_INTERPRET=1 in the environment before triton
is imported, Triton's interpreter runs the same kernels on CPU tensors; that is how they are tested.

`QuantLinear` (`linear.py`) takes this path where `supports` allows it, and wraps both products for autograd.

Not covered: gradients of weights, other formats, products with some of the rows, and any claim of speed:
`bench/triton_matmul.py` measures it where there is a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from lichen.errors import EngineError, TensorError
from lichen.quant.formats import GGMLType, row_bytes, tensor_type

SUPPORTED = frozenset({GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K})
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
OLDEST = (7, 5)  # Triton compiles for no older NVIDIA cards: RTX 20 and GTX 16


class Tile(NamedTuple):
    """What one program does: a [tokens, across] part of the result, `along` of the summed axis at a time."""

    tokens: int
    across: int
    along: int
    warps: int
    stages: int


# What the autotuner tries; docs/decisions/0007-triton-tiles.md has the numbers behind both lists. No program
# may take more than 48 KB of shared memory: a block may have 64 KB on RTX 20, 99 KB on RTX 30 and 40, and up
# to that size two blocks fit side by side on a multiprocessor of the latter.
TENSOR_CORE_TILES = (
    Tile(16, 64, 64, warps=4, stages=2),  # answers and short prompts: little to multiply, much to read
    Tile(32, 64, 64, warps=4, stages=3),
    Tile(64, 64, 64, warps=4, stages=3),
    Tile(128, 64, 64, warps=8, stages=2),  # training: one decoding serves 128 tokens
    Tile(128, 128, 32, warps=8, stages=2),
)
# Without tensor cores (see `_wide`) larger tiles than these spill registers.
PLAIN_TILES = (
    Tile(16, 32, 32, warps=4, stages=1),
    Tile(32, 32, 32, warps=4, stages=1),
    Tile(64, 64, 32, warps=8, stages=1),
)
INTERPRETED_TILE = TENSOR_CORE_TILES[1]  # two groups of columns wide, so that tests see more than one


def supports(type: GGMLType, device: torch.device) -> bool:
    """Whether `matmul` and `matmul_transposed` serve weights of that type on that device.

    True for the types of SUPPORTED on CUDA (from compute capability 7.5) and ROCm devices, if triton is
    installed; under Triton's interpreter on the CPU too.
    """
    if type not in SUPPORTED or importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return _interpreted()
    if device.type != "cuda":  # ROCm devices are called cuda too
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


def matmul(
    x: torch.Tensor, weight_bytes: torch.Tensor, type: GGMLType, rows: int, columns: int
) -> torch.Tensor:
    """x @ W^T: what a linear layer without bias makes of x.

    x: fp16, bf16 or fp32 [..., columns]. weight_bytes: W [rows, columns] as the file has it, uint8
    [rows, row_bytes] on the same device. Returns [..., rows] of x's dtype, summed in fp32.
    Raises TensorError when type, shapes, dtypes or devices do not fit, EngineError without triton.
    """
    return _product("forward", x, weight_bytes, type, rows, columns)


def matmul_transposed(
    dy: torch.Tensor, weight_bytes: torch.Tensor, type: GGMLType, rows: int, columns: int
) -> torch.Tensor:
    """dy @ W: the gradient of x, of the gradient of `matmul`'s result.

    dy: fp16, bf16 or fp32 [..., rows]. weight_bytes as for `matmul`. Returns [..., columns] of dy's dtype,
    summed in fp32. Raises TensorError and EngineError as `matmul` does.
    """
    return _product("backward", dy, weight_bytes, type, rows, columns)


def _product(
    direction: str, left: torch.Tensor, weights: torch.Tensor, type: GGMLType, rows: int, columns: int
) -> torch.Tensor:
    kind = tensor_type(type)
    summed, across = (columns, rows) if direction == "forward" else (rows, columns)
    _check_weights(kind, weights, rows, columns)
    _check_left("x" if direction == "forward" else "dy", left, summed, weights.device)
    _check_place(kind, weights.device)
    flat = left.reshape(-1, summed).contiguous()
    result = flat.new_empty(len(flat), across)
    if result.numel():
        sizes = (len(flat), rows, columns, weights.shape[1])
        with _current(weights.device):
            _launch(direction, kind, flat, weights, result, sizes)
    # not even a view of the same shape, which autograd would not let its caller add to in place
    return result if left.ndim == 2 else result.reshape(*left.shape[:-1], across)


def _launch(
    direction: str,
    kind: GGMLType,
    left: torch.Tensor,
    weights: torch.Tensor,
    result: torch.Tensor,
    sizes: tuple[int, int, int, int],
) -> None:
    """sizes: tokens, rows, columns, row_bytes."""
    across = "ROWS" if direction == "forward" else "COLUMNS"

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        return -(-sizes[0] // chosen["TOKENS"]), -(-result.shape[1] // chosen[across])

    from lichen.quant import triton_tiles

    decode = getattr(triton_tiles, f"decode_{kind.name.lower()}")
    wide = _wide(left)
    if _interpreted():  # the autotuner would look for a GPU to measure on
        kernel = getattr(triton_tiles, direction)[grid]
        sides = tile_sizes(direction, INTERPRETED_TILE)
        kernel(left, weights, result, *sizes, DECODE=decode, WIDE=wide, **sides)
        return
    tiles = PLAIN_TILES if wide else TENSOR_CORE_TILES
    kernel = _tuned(direction, kind, tiles, (sizes[0] - 1).bit_length())[grid]
    # fusion is said outright, because Triton 3.10 changes its default
    kernel(left, weights, result, *sizes, DECODE=decode, WIDE=wide, enable_fp_fusion=True)


@functools.cache
def _tuned(direction: str, kind: GGMLType, tiles: tuple[Tile, ...], doublings: int) -> Any:
    """The kernel with its autotuner, which measures once for each weight shape and dtype.

    One for each power of two of tokens, since the best tile depends on them, and batches differ a little.
    """
    import triton

    from lichen.quant import triton_tiles

    configs = [
        triton.Config(tile_sizes(direction, tile), num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles
    ]
    tune: Callable[[Any], Any] = triton.autotune(configs, key=["rows", "columns"])
    return tune(getattr(triton_tiles, direction))


def tile_sizes(direction: str, tile: Tile) -> dict[str, int]:
    """A tile in the kernels' own words: the result's second axis is rows forward, columns backward."""
    rows, columns = (tile.across, tile.along) if direction == "forward" else (tile.along, tile.across)
    return {"TOKENS": tile.tokens, "ROWS": rows, "COLUMNS": columns}


def _wide(left: torch.Tensor) -> bool:
    """Whether to multiply in fp32: fp32 itself, and what the device has no tensor cores for.

    Triton uses those of NVIDIA cards from compute capability 8.0 on. Its interpreter multiplies fp16, but
    takes the bits of bf16 for integers.
    """
    if left.dtype == torch.float32:
        return True
    if _interpreted():
        return left.dtype == torch.bfloat16
    return torch.version.hip is None and torch.cuda.get_device_capability(left.device) < (8, 0)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make it torch's current device, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check_weights(kind: GGMLType, weights: torch.Tensor, rows: int, columns: int) -> None:
    if kind not in SUPPORTED:
        names = ", ".join(sorted(known.name for known in SUPPORTED))
        raise TensorError(f"{kind.name} has no GPU kernel: those of {names} are written.")
    expected = (rows, row_bytes(kind, columns))
    if weights.dtype != torch.uint8 or tuple(weights.shape) != expected:
        raise TensorError(
            f"{rows} rows of {columns} columns as {kind.name} are uint8 {list(expected)}, "
            f"but the weights are {_name(weights.dtype)} {list(weights.shape)}."
        )
    if not weights.is_contiguous():
        raise TensorError("The weights are not contiguous.", hint="Pass a contiguous copy of them.")
    if weights.data_ptr() % 2:
        raise TensorError(
            "The weights begin at an odd address, but their scales are read as 16-bit words.",
            hint="Pass a copy of them.",
        )


def _check_left(name: str, left: torch.Tensor, last: int, device: torch.device) -> None:
    if left.dtype not in DTYPES:
        raise TensorError(f"{name} holds {_name(left.dtype)}, but must hold float16, bfloat16 or float32.")
    if left.ndim == 0 or left.shape[-1] != last:
        raise TensorError(f"{name} has the shape {list(left.shape)}, but its last axis must have {last}.")
    if left.device != device:
        raise TensorError(
            f"{name} lies on {left.device} and the weights on {device}.", hint="Move one of them."
        )


def _check_place(kind: GGMLType, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise EngineError("The triton package is not installed.", hint="Run: pip install lichen[gpu]")
    if not supports(kind, device):
        raise TensorError(
            f"The GPU kernels cannot run on {device}.",
            hint="Use a CUDA device of compute capability 7.5 or later, a ROCm device, or the CPU path.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
