"""`python -m bench.learning_speed`: lichen's trainer beside transformers and PEFT on the same lessons.

Every side takes the same steps over the same chats (banking77's questions, or GSM8K's with --lesson sums), in the
same order, with the same rate, rank and first numbers, each in a process of its own; sides take turns, and the
order turns with every round. Told are tokens a second of all steps (of questions and answers, padding not
counted), the peak memory of the steps and of the process, and the score on held-out questions afterwards,
since speed counts only at an equal score. Before that, each side computes the same logits and takes one step, and
what they differ by is told. lichen adapts the upper half of the blocks; `peft` the same ones, `peft-all` all.
Nothing is replayed. Exit code 1 when an aim is missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.certificate import certificate, close_certificate, model_file
from bench.command import carry_out
from bench.flags import model_flags
from bench.learning_side import SIDES, SpeedJob, lora_of
from bench.learning_tables import learning_speed_rows
from bench.numbers import median, paired_ratio
from bench.peer import ROOT, BenchError
from bench.table import aligned
from bench.taught import Schoolbook
from lichen.adapters.course import Course
from lichen.adapters.task import Keeping, Task

FASTER, MEMORY = 1.8, 0.45  # what lichen must reach beside PEFT
SAME_LOSS, SAME_LOGITS = 1e-3, 1e-2  # share of the first loss; largest difference of a logit
AS_GOOD = 0.05  # share by which the held-out losses may differ, at which speeds are compared


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result."""
    flags = model_flags("learning_speed", "the trainer beside PEFT")
    flags.add_argument("--rounds", type=int, default=3, help="of each side")
    flags.add_argument("--steps", type=int, default=40)
    flags.add_argument("--batch", type=int, default=8, help="lessons a step")
    flags.add_argument(
        "--lessons", type=int, default=160, help="to learn from; a second epoch finds them cached"
    )
    flags.add_argument("--measured", type=int, default=64, help="held-out ones")
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--lesson", choices=("banking", "sums"), default="banking")
    flags.add_argument("--sides", default=",".join(SIDES), help="which; lichen must be among them")
    flags.add_argument("--no-save", action="store_true", help="write no result")
    options = flags.parse_args(arguments)
    return carry_out(
        "learning_speed",
        options,
        _measure,
        tables=lambda record: [aligned(learning_speed_rows(record), left=1)],
        line=lambda record: {key: record[key] for key in ("status", "first", "ratios", "aims")},
        good=lambda record: all(record["aims"].values()),
    )


def _measure(options: Namespace) -> dict[str, Any]:
    sides = options.sides.split(",")
    if "lichen" not in sides or not set(sides) <= set(SIDES):
        raise BenchError(f"--sides takes some of {', '.join(SIDES)}, lichen among them.")
    path = model_file(options.model)
    birth = certificate(path)
    with tempfile.TemporaryDirectory() as folder:
        job = _job(options, path)
        (Path(folder) / "job.json").write_bytes(msgspec.json.encode(job))
        first = _first(sides, Path(folder), options.threads)
        runs = []
        for number in range(options.rounds):
            for side in [*sides[number % len(sides) :], *sides[: number % len(sides)]]:
                found = _side(side, Path(folder) / "job.json", options.threads)
                runs.append({"round": number, "side": side, "status": "ok", **found})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    close_certificate(birth)
    names = ("threads", "rounds", "steps", "batch", "lessons", "measured", "rank", "lesson")
    settings = {name: getattr(options, name) for name in names}
    record = {"kind": "learning_speed", "status": "ok", "birth": birth, "servers": {}, "runs": runs}
    return {**record, "settings": settings, "first": first, **summarized(job, runs, first)}


def summarized(job: SpeedJob, runs: Sequence[dict[str, Any]], first: dict[str, Any]) -> dict[str, Any]:
    """Medians of each side, ratios within the rounds, and which aims are reached."""
    tokens = _tokens(job)
    sides = list(dict.fromkeys(run["side"] for run in runs))
    summary = {}
    for side in sides:
        own = [run for run in runs if run["side"] == side]
        names = ("peak_training_mb", "peak_mb", "exact", "held_out_loss")
        summary[side] = {name: median(run[name] for run in own) for name in names}
        summary[side]["tokens_per_second"] = median(tokens / run["seconds"] for run in own)
    ratios: dict[str, Any] = {}
    for side in (side for side in sides if side != "lichen"):
        ratios[side] = {
            "speed": paired_ratio(_by_round(runs, side, "seconds"), _by_round(runs, "lichen", "seconds")),
            **{
                name: paired_ratio(_by_round(runs, "lichen", name), _by_round(runs, side, name))
                for name in ("peak_training_mb", "peak_mb", "held_out_loss")
            },
        }
    return {"tokens": tokens, "summary": summary, "ratios": ratios, "aims": _aims(ratios, first)}


def _aims(ratios: dict[str, Any], first: dict[str, Any]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for side, ratio in ratios.items():
        found |= {
            f"{FASTER} times the tokens/s of {side}": ratio["speed"]["median"] >= FASTER,
            f"{MEMORY} of the memory of {side}": ratio["peak_training_mb"]["median"] <= MEMORY,
            f"a held-out loss as low as {side}'s": ratio["held_out_loss"]["median"] <= 1 + AS_GOOD,
        }
    for side, differs in first["differences"].items():
        found[f"the logits and the loss of {side} at first"] = (
            differs["loss"] <= SAME_LOSS and differs["largest_logit"] <= SAME_LOGITS
        )
    return found


def _first(sides: Sequence[str], folder: Path, threads: int) -> dict[str, Any]:
    """The first step of each side, and how far it is from lichen's."""
    found: dict[str, Any] = {}
    logits: dict[str, Any] = {}
    for side in sides:
        path = folder / f"{side}.npy"
        found[side] = _side(side, folder / "job.json", threads, "--first", str(path))
        logits[side] = np.load(path)
    ours = logits["lichen"]
    differences = {
        side: {
            "loss": abs(found[side]["loss"] / found["lichen"]["loss"] - 1),
            "largest_logit": float(np.abs(logits[side] - ours).max()),
            "spread_of_logits": float(ours.std()),
        }
        for side in sides
        if side != "lichen"
    }
    return {"sides": found, "differences": differences}


def _side(side: str, job: Path, threads: int, *more: str) -> dict[str, Any]:
    """What a side's process says. Raises BenchError when it ends otherwise."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.learning_side", side, str(job), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"The side {side} ended with code {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _job(options: Namespace, path: Path) -> SpeedJob:
    book = Schoolbook(path)
    try:
        lessons = book.banking if options.lesson == "banking" else book.sums
        train, held_out = lessons("train")[: options.lessons], lessons("test")[: options.measured]
    finally:
        book.close()
    task = Task(
        name="speed",
        model=str(path.resolve()),
        output="",
        lora=lora_of(options.rank),
        keeping=Keeping(weight=0),
        batch=options.batch,
        threads=options.threads,
    )
    return SpeedJob(task=task, steps=options.steps, train=train, held_out=held_out)


def _tokens(job: SpeedJob) -> int:
    """Of all questions and answers that the steps take."""
    course = Course(len(job.train), job.task.batch, job.task.seed)
    taken = [job.train[number] for _ in range(job.steps) for number in course.next()]
    return sum(len(example.prompt) + len(example.answer) for example in taken)


def _by_round(runs: Sequence[dict[str, Any]], side: str, name: str) -> dict[int, float | None]:
    return {run["round"]: run[name] for run in runs if run["side"] == side}


if __name__ == "__main__":
    sys.exit(main())
