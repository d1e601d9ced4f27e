"""`python -m bench.dequantize`: stored weights to float32, by lichen and by the numpy code of `gguf`.

A matrix of each type, and all tensors of the model. In each run the three take turns on the same bytes:
lichen on all threads, lichen on one, and `gguf.dequantize`, which has one thread only. What comes out is
compared bit for bit. Rates are elements of the result a second; buffers are made, and touched, before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import model_flags
from bench.numbers import median, paired_ratio, rounded
from bench.table import Rows, aligned, number
from lichen.errors import LichenError
from lichen.quant.ggml import GGMLType, dequantize, quantize, row_bytes
from lichen.quant.gguf import open_gguf

TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "F16", "BF16")
WAYS = ("lichen", "lichen_1", "gguf")

Stored = tuple[GGMLType, npt.NDArray[np.uint8], npt.NDArray[np.float32]]  # type, rows, room for the result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result. 1 when a bit differs or it failed."""
    flags = model_flags("dequantize", "stored weights to float32, beside numpy")
    flags.add_argument("--runs", type=int, default=7)
    flags.add_argument("--rows", type=int, default=4096)
    flags.add_argument("--columns", type=int, default=4096)
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(_rows(record), left=1))
    ratios = {name: ratio["median"] for name, ratio in record["ratios"].items()}
    print(json.dumps({"bench": "dequantize", "result": path.name, "ratios": ratios}))
    return 0 if record["status"] == "ok" else 1


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = model_file(options.model)
    record: dict[str, Any] = {
        "kind": "dequantize",
        "status": "ok",
        "birth": certificate(model),
        "settings": {name: getattr(options, name) for name in ("threads", "rows", "columns")},
        "versions": {"numpy": np.__version__},
        "runs": [],
        "summary": {},
        "ratios": {},
    }
    for name in TYPES:
        _compare(name, [_matrix(GGMLType[name], options)], options, record)
    _compare("model", _tensors_of(model), options, record)
    close_certificate(record["birth"])
    return record


def _matrix(kind: GGMLType, options: argparse.Namespace) -> Stored:
    """Normal weights of the usual size, stored."""
    shape = (options.rows, options.columns)
    weights = np.random.default_rng(1).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    rows = np.empty((shape[0], row_bytes(kind, shape[1])), np.uint8)
    quantize(kind, weights, rows, threads=options.threads)
    return kind, rows, np.ones(shape, np.float32)


def _tensors_of(model: Path) -> list[Stored]:
    with open_gguf(model) as file:
        return [(one.type, one.data, np.ones(one.shape, np.float32)) for one in file.tensors.values()]


def _compare(
    name: str, tensors: Sequence[Stored], options: argparse.Namespace, record: dict[str, Any]
) -> None:
    """All three in turn, `runs` times and once before that does not count; their rates, and whether they agree."""
    elements = sum(out.size for _, _, out in tensors)
    ways: dict[str, Callable[[Stored], object]] = {
        "lichen": lambda one: dequantize(one[0], one[1], one[2], threads=options.threads),
        "lichen_1": lambda one: dequantize(one[0], one[1], one[2], threads=1),
        "gguf": lambda one: gguf.dequantize(one[1], gguf.GGMLQuantizationType(int(one[0]))),
    }
    same = all(_equal(one) for one in tensors)
    rates: dict[str, dict[int, float | None]] = {way: {} for way in WAYS}
    for run in range(options.runs):
        for way in WAYS:
            rates[way][run] = elements / _seconds(ways[way], tensors)
        entry = {"run": run, "type": name, "status": "ok" if same else "different bits"}
        record["runs"].append({**entry, **{way: rounded(rates[way][run], 0) for way in WAYS}})
    if not same:
        record["status"] = "failed"
    record["summary"][name] = {
        "elements": elements,
        "same_bits": same,
        **{way: rounded(median(rates[way].values()), 0) for way in WAYS},
    }
    record["ratios"][name] = paired_ratio(rates["lichen"], rates["gguf"])


def _equal(one: Stored) -> bool:
    kind, rows, out = one
    dequantize(kind, rows, out)
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType(int(kind)))
    return np.array_equal(out.reshape(expected.shape), expected)


def _seconds(way: Callable[[Stored], object], tensors: Sequence[Stored]) -> float:
    started = time.perf_counter()
    for one in tensors:
        way(one)
    return time.perf_counter() - started


def _rows(record: dict[str, Any]) -> Rows:
    threads = record["settings"]["threads"]
    rows: Rows = [
        [
            "10⁹ elements/s",
            f"lichen, {threads} threads",
            "lichen, 1",
            "gguf",
            "lichen ÷ gguf",
            "range",
            "same bits",
        ]
    ]
    for name, cell in record["summary"].items():
        ratio = record["ratios"][name]
        rates = [number(cell[way] / 1e9, 3) for way in WAYS]
        spread = f"{ratio['low']:.1f}..{ratio['high']:.1f}"
        rows.append([name, *rates, number(ratio["median"], 1), spread, "yes" if cell["same_bits"] else "NO"])
    return rows


if __name__ == "__main__":
    sys.exit(main())
