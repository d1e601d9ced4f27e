"""Fingerprints as two cores with AVX2 gave them (docs/log.md): three layouts of a model of 135M."""

from __future__ import annotations

from lichen.devices.curves import Curve, Fingerprint, KVCost, ThreadCurve

_POINTS = {  # milliseconds of a batch with two threads, by its tokens
    "source": ((1, 7.2), (2, 10.8), (4, 18.0), (8, 33.0), (16, 60.0), (32, 110.0), (64, 215.0), (256, 830.0)),
    "Q8_0": ((1, 9.8), (2, 13.0), (4, 19.0), (8, 29.0), (16, 52.0), (32, 98.0), (64, 180.0), (256, 690.0)),
    "F16": ((1, 14.2), (2, 16.5), (4, 21.0), (8, 34.0), (16, 46.0), (32, 72.0), (64, 125.0), (256, 420.0)),
}
_BYTES = {"source": 98_362_432, "Q8_0": 144_810_000, "F16": 270_886_176}
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
        kv=(KVCost(type="f16", cell_bytes=23_040, read=Curve(((1.0, 2.2e-6), (2.0, 1.2e-6)))),),
        compute=Curve(((64.0, 20e6), (512.0, 110e6))),
        weight_bytes=_BYTES[layout],
        fixed_bytes=60_000_000,
        load_seconds=0.2,
        bandwidth=13e9,
    )


ALL = tuple(fingerprint(layout) for layout in _POINTS)
