"""`python -m bench.adapters`: what it costs that several adapters answer at the same time.

Streams of two adapters, so many each, decode one token after another: in one context that changes its adapter after
every 1, 2, 4 or 8 steps, and in two contexts over one loaded model, each with its adapter for good. The ways take turns
within each run. For comparison: as many streams, half at a time, without any adapter. Processor time is told beside
the clock's, since it says more on a machine that does other work (with one thread; more of them wait by spinning).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import versions
from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import model_flags
from bench.numbers import median
from bench.table import Rows, aligned, number
from lichen.errors import LichenError
from lichen.runtime.native import Adapter, Context, ContextSize, Model

TURNS = (1, 2, 4, 8)  # steps between two changes
PROMPT = 64  # tokens that each stream begins with


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result."""
    flags = model_flags("adapters", "several adapters at the same time")
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--steps", type=int, default=32, help="of each adapter in a run; a multiple of 8")
    flags.add_argument("--streams", type=int, default=4, help="of each adapter")
    flags.add_argument("--context", type=int, default=1024, help="tokens of a stream")
    options = flags.parse_args(arguments)
    try:
        record = _measure(options)
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    path = save(record)
    print(aligned(_rows(record), left=1))
    print(json.dumps({"bench": "adapters", "result": path.name, "summary": record["summary"]}))
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    path = model_file(options.model)
    record: dict[str, Any] = {
        "kind": "adapters",
        "status": "ok",
        "birth": certificate(path),
        "settings": {name: getattr(options, name) for name in ("threads", "steps", "streams", "context")},
        "runs": [],
    }
    model = Model(path)
    with tempfile.TemporaryDirectory() as folder:
        adapters = [
            Adapter(model, versions.adapter(path, Path(folder) / f"{seed}.gguf", seed)) for seed in (1, 2)
        ]
    shared = _Streams(model, options, 2 * options.streams)
    apart = [_Streams(model, options, options.streams) for _ in adapters]
    ways: dict[str, Callable[[], None]] = {
        "no adapter": lambda: _turns(shared, [None, None], options, 1),
        **{f"switching after {turn}": _switching(shared, adapters, options, turn) for turn in TURNS},
        "two contexts": lambda: _apart(apart, options),
    }
    for streams, adapter in zip(apart, adapters, strict=True):
        streams.context.adapt(adapter, 1.0)
    for streams in (shared, *apart):
        streams.begin()
    steps = 2 * options.steps
    for _ in range(options.runs):
        run = {}
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            way()
            times = time.perf_counter() - started, time.process_time() - used
            run[name] = {"wall": times[0] / steps * 1e3, "cpu": times[1] / steps * 1e3}
            for streams in (shared, *apart):
                streams.rewind()
        record["runs"].append(run)
    record["summary"] = {
        name: {kind: median(run[name][kind] for run in record["runs"]) for kind in ("wall", "cpu")}
        for name in ways
    }
    for streams in (shared, *apart):
        streams.context.close()
    for adapter in adapters:
        adapter.close()
    model.close()
    close_certificate(record["birth"])
    return record


class _Streams:
    """A context and sequences in all of its slots."""

    def __init__(self, model: Model, options: argparse.Namespace, slots: int) -> None:
        size = ContextSize(
            context=options.context, slots=slots, threads=options.threads, batch=max(PROMPT, slots)
        )
        self.context, self.slots = Context(model, size), slots

    def begin(self) -> None:
        """Every slot holds a prompt."""
        for slot in range(self.slots):
            self.context.clear(slot)
            tokens = [1000 + slot + index for index in range(PROMPT)]
            assert self.context.decode(tokens, list(range(PROMPT)), [slot] * PROMPT, [0] * PROMPT) == 0

    def rewind(self) -> None:
        """Every slot holds its prompt again."""
        for slot in range(self.slots):
            self.context.truncate(slot, PROMPT)

    def step(self, slots: range, at: int) -> None:
        """One more token in each of these slots."""
        tokens = [2000 + at] * len(slots)
        positions = [PROMPT + at] * len(slots)
        assert self.context.decode(tokens, positions, list(slots), [1] * len(slots)) == 0


def _turns(
    streams: _Streams, adapters: Sequence[Adapter | None], options: argparse.Namespace, turn: int
) -> None:
    """Both halves of the slots to the end, in turns of so many steps."""
    for start in range(0, options.steps, turn):
        for half, adapter in enumerate(adapters):
            streams.context.adapt(adapter, 1.0)
            slots = range(half * options.streams, (half + 1) * options.streams)
            for at in range(start, start + turn):
                streams.step(slots, at)
    streams.context.adapt(None, 0.0)


def _switching(
    streams: _Streams, adapters: Sequence[Adapter], options: argparse.Namespace, turn: int
) -> Callable[[], None]:
    return lambda: _turns(streams, adapters, options, turn)


def _apart(all_streams: Sequence[_Streams], options: argparse.Namespace) -> None:
    for at in range(options.steps):
        for streams in all_streams:
            streams.step(range(options.streams), at)


def _rows(record: dict[str, Any]) -> Rows:
    rows: Rows = [["way", "ms a step", "processor ms a step", "times no adapter"]]
    plain = record["summary"]["no adapter"]
    for name, found in record["summary"].items():
        ratio = found["cpu"] / plain["cpu"]
        rows.append([name, number(found["wall"], 2), number(found["cpu"], 2), number(ratio, 2)])
    return rows


if __name__ == "__main__":
    sys.exit(main())
