"""Fingerprints as two cores with AVX2 gave them (docs/log.md): three layouts of a model of 135M."""

from __future__ import annotations

from lichen.devices.curves import Curve, Fingerprint, KVCost, ThreadCurve
from lichen.devices.fingerprint import PAIRED, Key, Record, Shape, Task, tasks

_POINTS = {  # milliseconds of a batch with two threads, by its tokens
    "source": ((1, 7.2), (2, 10.8), (4, 18.0), (8, 33.0), (16, 60.0), (32, 110.0), (64, 215.0), (256, 830.0)),
    "Q8_0": ((1, 9.8), (2, 13.0), (4, 19.0), (8, 29.0), (16, 52.0), (32, 98.0), (64, 180.0), (256, 690.0)),
    "F16": ((1, 14.2), (2, 16.5), (4, 21.0), (8, 34.0), (16, 46.0), (32, 72.0), (64, 125.0), (256, 420.0)),
}
_BYTES = {"source": 98_362_432, "Q8_0": 144_810_000, "F16": 270_886_176}
_CELLS = Curve(((1.0, 2.2e-6), (2.0, 1.2e-6)))
DIVERGENCE = {"Q8_0": 2e-4, "F16": 1e-5}


def fingerprint(layout: str) -> Fingerprint:
    """One layout; one thread takes 1.85 times as long as two."""
    two = tuple((float(tokens), ms / 1000) for tokens, ms in _POINTS[layout])
    one = tuple((tokens, 1.85 * seconds) for tokens, seconds in two)
    return Fingerprint(
        hardware="2c-avx2",
        model="b179c952",
        layout=layout,
        library="0.3.36",
        threads=(
            ThreadCurve(threads=1, batch=Curve(one), output_row=9e-4),
            ThreadCurve(threads=2, batch=Curve(two), output_row=5e-4),
        ),
        kv=(KVCost(type="f16", cell_bytes=23_040, read=_CELLS, alone=_CELLS),),
        compute=Curve(((64.0, 20e6), (512.0, 110e6))),
        weight_bytes=_BYTES[layout],
        fixed_bytes=60_000_000,
        load_seconds=0.2,
        bandwidth=13e9,
    )


ALL = tuple(fingerprint(layout) for layout in _POINTS)


def record(layout: str, key: Key, threads: int) -> Record:
    """The samples that this layout's curves follow from, as if this machine had been measured."""
    curves = fingerprint({"q8_0": "Q8_0", "f16": "F16"}.get(layout, layout))
    shape = Shape(
        layers=(2, 10),
        layer_bytes=(1_000_000, 5_000_000),
        whole_layers=30,
        whole_layer_bytes=15_000_000,
        tensor_bytes=curves.weight_bytes,
        read_bytes=curves.weight_bytes,
    )
    made = Record(key=key, shape=shape)
    for task in tasks(threads):
        value = _value(curves, task)
        sample = (0.001, 0.001 + value) if task.kind in PAIRED else (value, value)
        for _ in range(task.samples(5)):
            made.add(task, sample)
    return made


def _value(curves: Fingerprint, task: Task) -> float:
    used = min(2, task.threads)
    match task.kind:
        case "decode":
            return curves.seconds(task.tokens, threads=used, rows=task.tokens)
        case "row":
            return curves.seconds(task.tokens, threads=used)
        case "chunk":
            return curves.seconds(task.tokens, threads=used, attended=task.tokens * (task.tokens + 1) / 2)
        case "depth":
            return task.tokens * task.depth * curves.cache("f16").read.at(used) * 2 / 30
        case "alone":
            return task.depth * curves.cache("f16").alone.at(used) * 10 / 30
        case "load":
            return curves.load_seconds
        case "resident":
            return float(curves.weight_bytes + 20_000_000)
        case "buffers":
            return curves.compute.at(task.tokens)
        case "cells":
            return 23_040 / (1 if task.kv == "f16" else 1.88)
