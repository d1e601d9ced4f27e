"""Which tile size is fastest for quantized layers, and what a layer costs beside a dense one.

    python -m bench.layers [--rounds N]

Every variant is tried once a round, one after the other, and the best round counts, so that what else the
machine does falls on all alike. A variant is one forward and one backward pass over 1,024 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from lichen.quant import ggml, linear
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor
from lichen.quant.linear import QuantLinear

TOKENS = 1024
SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096))  # [rows, columns]
TILES = (1 << 16, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 30)


def main() -> None:
    """Print a line a shape: milliseconds of the dense layer, then of each tile size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, {TOKENS} tokens, Q4_1, forward and backward, ms")
    print("shape".ljust(14), "dense".rjust(8), *(f"{tile >> 10}k".rjust(8) for tile in TILES))
    for rows, columns in SHAPES:
        layer = QuantLinear(stored(rows, columns))
        variants: list[Callable[[], None]] = [partial(step, layer.dense().requires_grad_(False))]
        variants += [partial(step, layer, tile) for tile in TILES]
        best = [float("inf")] * len(variants)
        for _ in range(rounds + 1):
            for index, variant in enumerate(variants):
                started = time.perf_counter()
                variant()
                best[index] = min(best[index], time.perf_counter() - started)
        print(f"{rows}x{columns}".ljust(14), *(f"{seconds * 1e3:8.1f}" for seconds in best))


def stored(rows: int, columns: int) -> GGUFTensor:
    """A random matrix as Q4_1."""
    values = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    data = np.empty((rows, ggml.row_bytes(GGMLType.Q4_1, columns)), np.uint8)
    ggml.quantize(GGMLType.Q4_1, values, data)
    return GGUFTensor("w", GGMLType.Q4_1, (rows, columns), data)


def step(layer: QuantLinear | nn.Linear, tile: int | None = None) -> None:
    """One forward and backward pass; tile: what `linear.TILE` is meanwhile."""
    kept = linear.TILE
    linear.TILE = tile or kept
    try:
        x = torch.randn(TOKENS, layer.in_features, requires_grad=True)
        y = layer(x)
        torch.autograd.backward(y, torch.ones_like(y))
    finally:
        linear.TILE = kept


if __name__ == "__main__":
    main()
