"""What was measured of one layout of one model on one machine: the fingerprint that plans are made from.

A decode step and a chunk of a prompt are the same work for llama.cpp: a batch of tokens. So one curve gives
the seconds of a batch by its tokens; what differs (rows of the output layer, cells of the KV cache that are
read) is added to it. Seconds, bytes and tokens throughout.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right

import msgspec

from lichen.errors import ConfigError

VERSION = 2


class Curve(msgspec.Struct, frozen=True):
    """A function known at some points: (x, y), straight lines between them.

    Left of the first point it is the first value; right of the last it goes on with the last slope, which is
    never taken for negative. x rises strictly.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        places = [x for x, _ in self.points]
        if not places or any(b <= a for a, b in itertools.pairwise(places)):
            raise ConfigError("A measured curve needs points whose places rise.", hint="Measure again.")

    def at(self, x: float) -> float:
        """Its value at x."""
        points = self.points
        if x <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = min(bisect_right(points, x, key=lambda point: point[0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        slope = (y1 - y0) / (x1 - x0)
        if x > x1:
            return y1 + max(0.0, slope) * (x - x1)
        return y0 + slope * (x - x0)


class ThreadCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a batch with this many threads.

    batch: seconds by tokens of the batch, with one row of logits and an empty KV cache. output_row: seconds
    of each further row of logits.
    """

    threads: int
    batch: Curve
    output_row: float


class KVCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the KV cache of one type costs.

    cell_bytes: bytes of one token in one sequence. read: seconds that one token of a prompt adds for each
    cell that it attends to, by threads; those before it in its own batch count, and so does the token itself.
    alone: the same for a token that is its sequence's only one in the batch. Tokens of a prompt share what
    they read, so theirs is less.
    """

    type: str
    cell_bytes: int
    read: Curve
    alone: Curve


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """One layout of one model on one class of machines.

    hardware: the class (`devices/hardware.py`). model: sha256 of the file that was asked for. layout:
    "source", or the ggml type that it was requantized to. library: version of llama.cpp's binding. compute:
    bytes of llama.cpp's buffers by tokens of a batch. weight_bytes: with second copies that llama.cpp makes.
    fixed_bytes: that loading it adds to a process besides weights, KV cache and buffers (vocabulary, graph).
    bandwidth: bytes of weights read in a second at batches of one token.
    """

    version: int = VERSION
    hardware: str
    model: str
    layout: str
    library: str
    threads: tuple[ThreadCurve, ...]
    kv: tuple[KVCost, ...]
    compute: Curve
    weight_bytes: int
    fixed_bytes: int
    load_seconds: float
    bandwidth: float

    def seconds(
        self,
        tokens: float,
        *,
        threads: int,
        rows: float = 1,
        attended: float = 0,
        alone: float = 0,
        kv_type: str = "f16",
    ) -> float:
        """Of one batch: its tokens, rows of logits, and cells attended to, summed over the tokens of prompts
        and over those that are alone in their sequence. Numbers may be means of several batches."""
        curve, cache = self.curve(threads), self.cache(kv_type)
        reading = attended * cache.read.at(threads) + alone * cache.alone.at(threads)
        return curve.batch.at(tokens) + max(0.0, rows - 1) * curve.output_row + reading

    def curve(self, threads: int) -> ThreadCurve:
        """The curve of the nearest number of threads that was measured, not above it where there is one."""
        below = [curve for curve in self.threads if curve.threads <= threads]
        return max(below, key=_threads) if below else min(self.threads, key=_threads)

    def cache(self, kv_type: str) -> KVCost:
        """What the KV cache of a type costs. Raises ConfigError where it was not measured."""
        for cost in self.kv:
            if cost.type == kv_type:
                return cost
        known = ", ".join(cost.type for cost in self.kv)
        raise ConfigError(f"No KV cache of type {kv_type} was measured.", hint=f"Measured are {known}.")


def _threads(curve: ThreadCurve) -> int:
    return curve.threads
