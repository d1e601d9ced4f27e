"""What learning on the device brings and what it costs: one lesson, and lessons one after another.

    python -m bench.learn lesson [--model MODEL] [--minutes N] [--lessons N]
    python -m bench.learn sequence [--model MODEL] [--steps N] [--lessons N] [--seeds N] [--arms A,B] [--keep FILE]

`lesson`: banking77 as a stream of corrections ("which intent is this?", 77 labels). A real trainer's process
learns for so many minutes, and its held-out error, its loss on held-out answers and its loss on general answers
(the model's own to Spec-Bench's questions, none of which is replayed) are measured on the way. `sequence` is
explained in `bench/sequence.py`; with --keep each way and seed is written down once it is done, and the same
command goes on after an interruption. Writes a result to bench/results/ and a picture to docs/img/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import DEFAULT_MODEL
from bench.peer import ROOT
from bench.pictures import draw_lesson
from bench.sequence import ARMS, Lessons, sequence
from bench.sequence_table import draw_sequence, sequence_rows, summarized
from bench.table import markdown
from bench.taught import Schoolbook
from lichen.adapters.events import Event, Finished, Measured, Stepped
from lichen.adapters.launch import Training, prepare
from lichen.adapters.recall import recall
from lichen.adapters.task import Examples, Task
from lichen.models.load import load_model

QUESTIONS = 64  # of Spec-Bench
HELD_OUT = 256  # of banking77's test questions


def main() -> None:
    """Run what is named, print its result as a JSON line and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    lesson = commands.add_parser("lesson")
    lesson.add_argument("--minutes", type=float, default=30)
    lesson.add_argument("--lessons", type=int, default=6000)
    lesson.add_argument("--rate", type=float, default=0.0)
    lesson.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    lesson.add_argument("--model", default=DEFAULT_MODEL, help="a GGUF file, or a model of lichen's store")
    many = commands.add_parser("sequence")
    for name, default in (("steps", 24), ("lessons", 200), ("measured", 64), ("seeds", 3)):
        many.add_argument(f"--{name}", type=int, default=default)
    many.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    many.add_argument("--arms", default=",".join(ARMS), help="which ways, of all by default")
    many.add_argument("--keep", type=Path, help="file that finished ways and seeds are kept in")
    many.add_argument("--model", default=DEFAULT_MODEL, help="a GGUF file, or a model of lichen's store")
    options = parser.parse_args()
    options.model = model_file(options.model)
    birth = certificate(options.model)
    made = one_lesson(options) if options.command == "lesson" else many_lessons(options)
    record = {"kind": options.command, "birth": birth, **made}
    close_certificate(birth)
    save(record)
    if options.command == "lesson":
        draw_lesson(record, ROOT / "docs" / "img")
        record = {name: record[name] for name in ("before", "after", "steps", "seconds")}
    else:
        draw_sequence(record["runs"], ROOT / "docs" / "img")
        print(markdown(sequence_rows(record["runs"])))
        record = record["summary"]
    print(json.dumps(record))


def many_lessons(options: argparse.Namespace) -> dict[str, Any]:
    """Lessons in sequence, every arm with every seed; each result is shown when it is there."""
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("steps", "lessons", "measured", "threads")}
    settings["model"] = options.model.name
    runs = _kept(options.keep, settings)
    for seed in range(options.seeds):
        lessons: Lessons | None = None
        for arm in options.arms.split(","):
            if any((run["arm"], run["seed"]) == (arm, seed) for run in runs):
                continue
            lessons = lessons or Lessons(
                options.model, lessons=options.lessons, measured=options.measured, seed=seed
            )
            runs.append(sequence(options.model, lessons, arm, options.steps, seed))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            if options.keep is not None:
                with options.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"settings": settings, "run": runs[-1]}) + "\n")
    return {"settings": {**settings, "seeds": options.seeds}, "summary": summarized(runs), "runs": runs}


def _kept(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of an earlier process with the same settings."""
    if path is None or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line["run"] for line in lines if line["settings"] == settings]


def one_lesson(options: argparse.Namespace) -> dict[str, Any]:
    """Learn banking77; the curve and what was measured."""
    examples = banking(options.model, options.lessons, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            name="banking77",
            model=str(options.model.resolve()),
            output=folder,
            minutes=options.minutes,
            rate=options.rate,
            threads=options.threads,
            measurements=5,
        )
        prepare(Path(folder) / "job", task, examples)
        events = list(Training(Path(folder) / "job"))
    settings = {name: getattr(options, name) for name in ("minutes", "lessons", "rate", "threads")}
    return {"settings": settings, **_summary(events)}


def banking(model: Path, lessons: int, threads: int) -> Examples:
    """banking77, with general answers that are made here and now."""
    book = Schoolbook(model)
    torch.set_num_threads(threads)
    own = recall(load_model(model), book.questions(QUESTIONS), ends=frozenset(book.ends), length=64, seed=1)
    examples = Examples(
        train=book.banking("train")[:lessons],
        held_out=book.banking("test")[:HELD_OUT],
        general=[one.example for one in own],
        asked=book.asked(),
        ends=book.ends,
    )
    book.close()
    return examples


def _summary(events: list[Event]) -> dict[str, Any]:
    steps = [event for event in events if isinstance(event, Stepped)]
    measured, at = [], 0
    for event in events:
        if isinstance(event, Stepped):
            at = event.step
        elif isinstance(event, Measured):
            assert event.loss is not None and event.exact is not None and event.general is not None
            measured.append(
                {"step": at, "loss": event.loss, "error": 1 - event.exact, "general": event.general}
            )
    (finished,) = (event for event in events if isinstance(event, Finished))
    return {
        "before": measured[0],
        "after": measured[-1],
        "measured": measured,
        "steps": len(steps),
        "seconds": round(finished.seconds, 1),
        "memory": finished.memory,
        "train": [[event.step, round(event.loss, 4), event.kept and round(event.kept, 5)] for event in steps],
    }


if __name__ == "__main__":
    main()
