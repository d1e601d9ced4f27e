"""Products over quantized weights on a GPU beside torch's dense fp16 ones: python -m bench.triton_matmul

Checks every format and both directions against ggml's dequantization first, and measures nothing that fails.
Then for each format and number of tokens: milliseconds, median of --runs timings by GPU events, after the
autotuner has chosen; the dense product is timed in turn with it. Prints a table, and as its last line one
JSON object. Exit status 1 without a usable GPU or with a wrong product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lichen.quant import ggml
from lichen.quant.formats import GGMLType, row_bytes
from lichen.quant.triton_kernels import SUPPORTED, matmul, matmul_transposed, supports

TOKENS = (1, 16, 128, 1024)
TOLERANCE = 2.0**-9  # two epsilons of fp16, in units of |x| @ |W|: weights and result are rounded once each


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--runs", type=int, default=30)
    given = parser.parse_args()
    if not torch.cuda.is_available() or not supports(GGMLType.Q4_0, torch.device("cuda")):
        print("There is no GPU here that lichen's Triton kernels can run on.", file=sys.stderr)
        return 1
    records = []
    for kind in sorted(SUPPORTED):
        stored, dense = weights(kind, given.rows, given.columns)
        worst = largest_error(kind, stored, dense)
        if worst > TOLERANCE:
            print(f"{kind.name} is off by {worst:.2e} of |x| @ |W|; nothing was measured.", file=sys.stderr)
            return 1
        half = dense.half()
        for tokens in TOKENS:
            records.append(
                {
                    "type": kind.name,
                    "tokens": tokens,
                    "error": worst,
                    **measure(kind, stored, half, tokens, given.runs),
                }
            )
    print(table(records))
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": given.rows,
        "columns": given.columns,
        "runs": given.runs,
    }
    print(json.dumps({"kind": "triton_matmul", "machine": machine, "records": records}))
    return 0


def weights(kind: GGMLType, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights as ggml stores them and as it reads them back: uint8 [rows, row_bytes], fp32 [rows, columns]."""
    numbers = np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype(np.float32)
    stored = np.empty((rows, row_bytes(kind, columns)), np.uint8)
    ggml.quantize(kind, numbers, stored)
    ggml.dequantize(kind, stored, numbers)
    return torch.from_numpy(stored).cuda(), torch.from_numpy(numbers).cuda()


def largest_error(kind: GGMLType, stored: torch.Tensor, dense: torch.Tensor) -> float:
    """Of both products of 33 tokens in fp16, against float64, in units of |left| @ |right|; a nan counts as 1."""
    rows, columns = dense.shape
    worst = 0.0
    for product, right in ((matmul, dense.T.double()), (matmul_transposed, dense.double())):
        left = torch.randn(33, len(right), device="cuda").half()
        error = (product(left, stored, kind, rows, columns).double() - left.double() @ right).abs()
        worst = max(worst, float((error / (left.double().abs() @ right.abs())).nan_to_num(nan=1.0).max()))
    return worst


def measure(
    kind: GGMLType, stored: torch.Tensor, half: torch.Tensor, tokens: int, runs: int
) -> dict[str, float]:
    """Milliseconds of both products, ours and dense, in turn."""
    rows, columns = half.shape
    x = torch.randn(tokens, columns, device="cuda").half()
    dy = torch.randn(tokens, rows, device="cuda").half()
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "forward_ms": lambda: matmul(x, stored, kind, rows, columns),
        "forward_dense_ms": lambda: x @ half.T,
        "backward_ms": lambda: matmul_transposed(dy, stored, kind, rows, columns),
        "backward_dense_ms": lambda: dy @ half,
    }
    for product in contestants.values():  # compiles and tunes
        product()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, product in contestants.items():
            times[name].append(milliseconds(product))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def milliseconds(product: Callable[[], torch.Tensor]) -> float:
    """Of one call, on the GPU's own clock."""
    started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    started.record()
    product()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended))


def table(records: list[dict[str, Any]]) -> str:
    """One line a format and number of tokens."""
    lines = ["type  tokens  forward ms  dense fp16 ms  backward ms  dense fp16 ms"]
    for line in records:
        lines.append(
            f"{line['type']:<5} {line['tokens']:>6} {line['forward_ms']:>11.3f} {line['forward_dense_ms']:>14.3f} "
            f"{line['backward_ms']:>12.3f} {line['backward_dense_ms']:>14.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
