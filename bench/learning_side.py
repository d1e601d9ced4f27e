"""One side of `bench/learning_speed.py` in a process of its own, so that its memory is its own.

    python -m bench.learning_side SIDE JOB.json [--first LOGITS.npy]

SIDE is lichen, peft (LoRA on the layers that lichen adapts) or peft-all (on all blocks). JOB.json is a `SpeedJob`.
Prints one JSON line: seconds of all steps, peak memory of them and of the whole process, and the score on held-out
answers afterwards. With --first it takes one step: its loss, the score before it, and the logits of LOGGED
examples go to the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from bench.peft_model import PeftLearner
from lichen.adapters.course import Course
from lichen.adapters.frozen import FrozenStates
from lichen.adapters.lora import attach
from lichen.adapters.objectives import Rows, common_beginning, measure
from lichen.adapters.task import Example, Examples, LoRAOptions, Task
from lichen.adapters.train import Trainer
from lichen.models.load import load_model

LOGGED = 4  # examples whose logits are compared
SIDES = ("lichen", "peft", "peft-all")


class SpeedJob(msgspec.Struct, frozen=True, kw_only=True):
    """What all sides do: the same steps over the same examples. task: with its rank, batch and threads."""

    task: Task
    steps: int
    train: list[Example]
    held_out: list[Example]


class Side(Protocol):
    """A model that learns."""

    def step(self) -> float:
        """Take one; its loss in nats an answer token."""
        ...

    def score(self) -> tuple[float, float]:
        """On the held-out: share of exact answers, nats a token."""
        ...

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """At all tokens before one of the answers, float32 [answer tokens, vocabulary]."""
        ...


class LichenSide:
    """The trainer's loop without its process. It replays nothing, as PEFT does not."""

    def __init__(self, job: SpeedJob, folder: Path) -> None:
        self._job, self._folder = job, folder
        self._model = load_model(Path(job.task.model))
        self._trainer = Trainer(self._model, job.task, Examples(train=job.train), folder)
        self._trainer.steps = job.steps

    def step(self) -> float:
        """See Side."""
        return self._trainer.advance().loss

    def score(self) -> tuple[float, float]:
        """See Side."""
        found = measure(self._rows(self._job.held_out), range(len(self._job.held_out)), self._job.task.tokens)
        return found.exact, found.loss

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """See Side."""
        rows, found = self._rows(examples), []
        with torch.no_grad():
            for number in range(len(examples)):
                hidden, where = rows.run([number])
                found.append(self._model.logits(hidden, where.positions))
        return torch.cat(found)

    def _rows(self, examples: Sequence[Example]) -> Rows:
        shared = common_beginning(examples)
        sequences = [[*example.prompt, *example.answer] for example in examples]
        states = FrozenStates(
            self._model, self._trainer.first, sequences, limit=0, folder=self._folder, shared=shared
        )
        lengths = [len(sequence) - shared for sequence in sequences]
        answers = [len(example.answer) for example in examples]
        return Rows(self._model, self._trainer.first, states, lengths, answers)


class PeftSide:
    """transformers and PEFT (`peft_model.py`). first: the lowest block that is adapted; None: lichen's."""

    def __init__(self, job: SpeedJob, first: int | None) -> None:
        self._job = job
        task = job.task
        if first is not None:
            task = msgspec.structs.replace(task, lora=msgspec.structs.replace(task.lora, first=first))
        ours = load_model(Path(task.model))
        lowest = attach(ours, task.lora, task.seed)
        self._learner = PeftLearner(Path(task.model), task, lowest)
        self._learner.copy_start(ours)
        del ours
        gc.collect()
        self._course = Course(len(job.train), task.batch, task.seed)

    def step(self) -> float:
        """See Side."""
        chosen = [self._job.train[number] for number in self._course.next()]
        return self._learner.advance(chosen, self._job.steps)

    def score(self) -> tuple[float, float]:
        """See Side."""
        return self._learner.score(self._job.held_out)

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """See Side."""
        found = []
        with torch.no_grad():
            for example in examples:
                tokens = torch.tensor([[*example.prompt, *example.answer]])
                found.append(self._learner.model(input_ids=tokens).logits[0, len(example.prompt) - 1 : -1])
        return torch.cat(found)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("job", type=Path)
    parser.add_argument("--first", type=Path)
    options = parser.parse_args()
    job = msgspec.json.decode(options.job.read_bytes(), type=SpeedJob)
    torch.set_num_threads(job.task.threads)
    with tempfile.TemporaryDirectory() as folder:
        side = _made(options.side, job, Path(folder))
        print(json.dumps(_begun(side, job, options.first) if options.first else _trained(side, job)))


def _made(name: str, job: SpeedJob, folder: Path) -> Side:
    if name == "lichen":
        return LichenSide(job, folder)
    return PeftSide(job, None if name == "peft" else 0)


def _begun(side: Side, job: SpeedJob, path: Path) -> dict[str, Any]:
    exact, loss = side.score()
    np.save(path, side.logits(job.train[:LOGGED]).float().numpy())
    return {"exact": exact, "held_out_loss": loss, "loss": side.step()}


def _trained(side: Side, job: SpeedJob) -> dict[str, Any]:
    _forget_peak()
    started = time.perf_counter()
    losses = [side.step() for _ in range(job.steps)]
    seconds = time.perf_counter() - started
    peak = _peak()
    exact, loss = side.score()
    return {
        "seconds": round(seconds, 3),
        "losses": [round(one, 5) for one in losses],
        "peak_training_mb": round(peak / 1e6, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        "exact": exact,
        "held_out_loss": loss,
    }


def _forget_peak() -> None:
    """Loading is not training, and transformers writes every weight as float32 meanwhile (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    """Most bytes in RAM since `_forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def lora_of(rank: int) -> LoRAOptions:
    """As `lichen learn --rank` has it."""
    return LoRAOptions(rank=rank, alpha=2.0 * rank)


if __name__ == "__main__":
    main()
