"""`python -m bench.fingerprint`: what a few layers say of a whole model, beside the whole model itself.

For each layout the cut model and the whole one are measured in turns, sample by sample, on the same tasks.
Prints the error of each task, its median and its largest for each layout, and how long a fingerprint takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import model_flags
from bench.table import Rows, aligned
from lichen.devices.fingerprint import PROBE, Key, Record, Task, fingerprint, tasks
from lichen.devices.schedule import measure, missing
from lichen.errors import LichenError
from lichen.quant.cut import layer_count
from lichen.quant.gguf import open_gguf
from lichen.runtime.measuring import NativeBench

TIMED = ("decode", "row", "chunk", "load")
DEEP = 1024  # cells, whose cost is compared


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result."""
    flags = model_flags("fingerprint", "errors of extrapolating from a few layers")
    flags.add_argument("--layouts", default="source,q8_0,f16")
    flags.add_argument("--rounds", type=int, default=5)
    options = flags.parse_args(arguments)
    try:
        model = model_file(options.model)
        record: dict[str, Any] = {"kind": "fingerprint", "status": "ok", "birth": certificate(model)}
        record["settings"] = {name: getattr(options, name) for name in ("threads", "layouts", "rounds")}
        record["layouts"] = {name: compare(model, name, options) for name in options.layouts.split(",")}
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    close_certificate(record["birth"])
    path = save(record)
    rows: Rows = [["layout", "seconds", "samples", "median error", "largest", "of"]]
    rows += [
        [name, *(str(one[key]) for key in ("seconds", "samples", "median_error", "largest_error", "worst"))]
        for name, one in record["layouts"].items()
    ]
    print(aligned(rows))
    print(json.dumps({"bench": "fingerprint", "result": path.name}))
    return 0


def compare(model: Path, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """One layout: a fingerprint as users get it, timed; then the cut and the whole model in turns."""
    wanted = tasks(options.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, NativeBench(model, layout, scratch=Path(folder)) as cut:
        prepared = time.perf_counter() - started
        taken = Record(key=_key(layout), shape=cut.shape)
        measure(cut, taken, wanted, save=lambda kept: None)
        seconds = time.perf_counter() - started
        found = fingerprint(taken, wanted)
        assert found is not None, "the first round always comes in full"
        with open_gguf(model) as file:
            layers = (layer_count(file),)
        with NativeBench(model, layout, scratch=Path(folder), layers=layers) as whole:
            errors = _errors(cut, whole, [task for task in wanted if task.kind in TIMED], options.rounds)
            errors |= _cell_errors(cut, whole, options.threads, options.rounds)
    worst = max(errors, key=lambda name: abs(errors[name]["error"]))
    shares = [abs(one["error"]) for one in errors.values()]
    return {
        "seconds": round(seconds, 2),
        "prepared_s": round(prepared, 2),
        "samples": sum(map(len, taken.samples.values())),
        "complete": not missing(taken, wanted, options.rounds),
        "median_error": round(statistics.median(shares), 4),
        "largest_error": errors[worst]["error"],
        "worst": worst,
        "tasks": errors,
    }


def _errors(
    cut: NativeBench, whole: NativeBench, timed: list[Task], rounds: int
) -> dict[str, dict[str, float]]:
    """Extrapolated and true seconds by task, and the one against the other."""
    short, full = Record(key=_key(""), shape=cut.shape), Record(key=_key(""), shape=whole.shape)
    for number in range(rounds):
        for task in timed:
            pairs = [(short, cut), (full, whole)]
            for record, bench in pairs if number % 2 else reversed(pairs):
                record.add(task, bench.measure(task))
    return dict(_beside(task.key, short.whole(task), full.whole(task)) for task in timed)


def _cell_errors(
    cut: NativeBench, whole: NativeBench, threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """The same for what 1,024 cells of the KV cache add to a step."""
    added: dict[str, list[float]] = {"cut": [], "whole": []}
    for _ in range(2 * rounds):
        for name, bench, layers in (("cut", cut, cut.shape.layers[0]), ("whole", whole, 1)):
            near, far = bench.measure(Task(kind="depth", threads=threads, tokens=PROBE, depth=DEEP))
            added[name].append(
                (far - near) / PROBE / layers * (cut.shape.whole_layers if name == "cut" else 1)
            )
    return dict([_beside("1024 cells", *(statistics.median(values) for values in added.values()))])


def _beside(name: str, guess: float | None, truth: float | None) -> tuple[str, dict[str, float]]:
    assert guess is not None and truth is not None, "each was measured"
    print(
        f"{name:<50} {guess * 1e3:9.2f} ms {truth * 1e3:9.2f} ms {guess / truth - 1:+7.1%}", file=sys.stderr
    )
    return name, {
        "extrapolated_s": round(guess, 6),
        "measured_s": round(truth, 6),
        "error": round(guess / truth - 1, 4),
    }


def _key(layout: str) -> Key:
    return Key(hardware="here", model="", layout=layout, library="")


if __name__ == "__main__":
    sys.exit(main())
