"""Five lessons one after another: four groups of banking77's intents, then GSM8K, by three ways to learn.

`ours`: every lesson beside the settled earlier ones, in directions that they do not read, with replay; then
folded in and pruned. `peft`: PEFT itself, one LoRA on the same layers trained on and on (`peft_model.py`). `o-lora`: a new
adapter a lesson beside the frozen ones, with O-LoRA's penalty 0.5 |A_old A_new^T|_1 (arXiv:2310.14152) and no
replay. Equal steps, batches, order, rate and first numbers. A question names no intents to choose from, so nothing
tells which lesson it is of. `ours` may change general answers more than the default allows (`KEEPING`), since nothing
holds the others back; the table has the loss on them. Scores: exact answers; of GSM8K the final number after the worked
steps of the book.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.peft_model import PeftLearner
from bench.taught import Schoolbook
from lichen.adapters.frozen import FrozenStates
from lichen.adapters.lora import LoRALinear, adapted, attach
from lichen.adapters.objectives import Rows, common_beginning, measure
from lichen.adapters.prune import components, prune
from lichen.adapters.recall import Recalled, recall
from lichen.adapters.task import Example, Examples, Keeping, Task
from lichen.adapters.train import Trainer
from lichen.models.load import load_model

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]

ARMS = ("ours", "peft", "o-lora")
GROUPS = 4  # of intents
EARLIER = 40  # examples of each earlier lesson that are kept for replay
ALLOWED = 0.01  # rise of the loss by pruning
PENALTY = 0.5
RATE = 4e-3  # of all: twice the default, since a lesson has few steps
KEEPING = Keeping(earlier=4, weight=1.0, budget=0.05)  # of ours
REPLAYED = 52  # general prompts


class Lessons:
    """What all arms learn and are measured on."""

    def __init__(self, model: Path, *, lessons: int, measured: int, seed: int) -> None:
        book = Schoolbook(model)
        intents = book.intents()
        groups = [set(intents[number::GROUPS]) for number in range(GROUPS)]
        self.train = [book.banking("train", intents=group, seed=seed)[:lessons] for group in groups]
        self.test = [book.banking("test", intents=group)[:measured] for group in groups]
        self.train.append(book.sums("train", seed=seed)[:lessons])
        self.test.append(book.final_numbers("test")[:measured])
        self._model, self._seed, self._ends = model, seed, frozenset(book.ends)
        self._asked, questions = book.asked()[:REPLAYED], book.questions(32)
        book.close()
        self.general = [one.example for one in self._answers(questions, seed=1)]

    @cached_property
    def recalled(self) -> list[Recalled]:
        """The model's own answers, which only `ours` replays."""
        return self._answers(self._asked, self._seed)

    def _answers(self, prompts: Sequence[list[int]], seed: int) -> list[Recalled]:
        return recall(load_model(self._model), prompts, ends=self._ends, length=48, seed=seed)


class OLoRA(Trainer):
    """Adds O-LoRA's penalty, and steps aside of nothing."""

    def _gradients(self, chosen: list[int]) -> tuple[float, int]:
        done = super()._gradients(chosen)
        for _, layer in adapted(self.model):
            if layer.settled is not None and len(layer.settled[0]):
                overlap = PENALTY * (layer.a @ layer.settled[0].t()).abs().sum()
                torch.autograd.backward(overlap)
        return done


def sequence(model: Path, lessons: Lessons, arm: str, steps: int, seed: int) -> dict[str, Any]:
    """Scores [after lesson i][on lesson j], general losses, bytes of the adapter, and seconds of each lesson.

    Of `ours` also what the last pruning gained and lost.
    """
    keeping = KEEPING if arm == "ours" else Keeping(weight=0)
    task = Task(name=arm, model=str(model), output="", rate=RATE, seed=seed, keeping=keeping)
    learner: _Settling | _Sequential
    with tempfile.TemporaryDirectory() as folder:
        learner = _Sequential(task, lessons) if arm == "peft" else _Settling(arm, task, lessons, Path(folder))
        found: dict[str, list[Any]] = {"scores": [], "general": [], "bytes": [], "seconds": []}
        for number in range(len(lessons.train)):
            started = time.monotonic()
            learner.learn(number, steps)
            found["seconds"].append(round(time.monotonic() - started, 1))
            scores, general = learner.measure(number)
            found["scores"].append(scores)
            found["general"].append(round(general, 5))
            found["bytes"].append(learner.bytes)
            print(f"{arm} {seed}: lesson {number + 1}: {scores}", file=sys.stderr, flush=True)
    pruned = {"pruned": learner.pruned} if isinstance(learner, _Settling) and learner.pruned else {}
    return {"arm": arm, "seed": seed, **found, **pruned, **summary(found["scores"])}


class _Settling:
    """`ours` and `o-lora`: what was learned stands beside what is learned."""

    def __init__(self, arm: str, task: Task, lessons: Lessons, folder: Path) -> None:
        self._arm, self._task, self._lessons, self._folder = arm, task, lessons, folder
        self._settled: Factors = {}
        self._earlier: list[Example] = []
        self._trainer: Trainer | None = None
        self.pruned: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        """Of all that is settled, in float32."""
        return sum(4 * (a.numel() + b.numel()) for a, b in self._settled.values())

    def learn(self, number: int, steps: int) -> None:
        """One more lesson, and what the arm does after it."""
        lessons, task = self._lessons, self._task
        train = lessons.train[number]
        examples = Examples(train=train, earlier=self._earlier)
        kind = OLoRA if self._arm == "o-lora" else Trainer
        recalled = lessons.recalled if self._arm == "ours" else []
        trainer = kind(load_model(Path(task.model)), task, examples, self._folder, recalled)
        self._trainer = trainer
        layers: dict[str, LoRALinear] = dict(adapted(trainer.model))
        for name, factors in self._settled.items():
            if self._arm == "ours":
                layers[name].settle(*factors)
            else:
                layers[name].settled = factors
        trainer.steps = steps
        while trainer.step < steps:
            trainer.advance()
        if self._arm == "ours":
            self._prune(trainer, number)
        self._settled = {name: components(*layer.factors()) for name, layer in layers.items()}
        self._earlier = [*self._earlier, *train[:EARLIER]]

    def measure(self, number: int) -> tuple[list[float], float]:
        """Scores on the lessons up to this one, and the loss on general answers."""
        assert self._trainer is not None, "it has learned something"
        tests = [*self._lessons.test[: number + 1], self._lessons.general]
        found = [_score(self._trainer, test, self._folder) for test in tests]
        return [round(exact, 4) for exact, _ in found[:-1]], found[-1][1]

    def _prune(self, trainer: Trainer, number: int) -> None:
        """Take out what does not pay; around the last time, measure what that costs."""
        last = number + 1 == len(self._lessons.train)
        before = self.measure(number)[0] if last else []
        recalled = [one.example for one in self._lessons.recalled[:EARLIER]]
        probes = [self._lessons.train[number][:EARLIER], self._earlier, recalled]
        rows = [_rows(trainer, probe, self._folder) for probe in probes if probe]
        done = prune(trainer.model, rows, allowed=ALLOWED, tokens=self._task.tokens)
        if last:
            self.pruned = {
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "final_before": round(fmean(before), 4),
                "final_after": round(fmean(self.measure(number)[0]), 4),
                "ranks": done.ranks,
            }


class _Sequential:
    """`peft`: one adapter for everything."""

    def __init__(self, task: Task, lessons: Lessons) -> None:
        self._task, self._lessons = task, lessons
        ours = load_model(Path(task.model))
        first = attach(ours, task.lora, task.seed)
        self._learner = PeftLearner(Path(task.model), task, first)
        self._learner.copy_start(ours)
        self.bytes = self._learner.bytes

    def learn(self, number: int, steps: int) -> None:
        """One more lesson."""
        self._learner.learn(self._lessons.train[number], steps, self._task.seed)

    def measure(self, number: int) -> tuple[list[float], float]:
        """As `_Settling` does it."""
        scores = [self._learner.score(test)[0] for test in self._lessons.test[: number + 1]]
        return [round(exact, 4) for exact in scores], self._learner.score(self._lessons.general)[1]


def summary(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """new: mean score of each lesson when it was new. forgetting: best minus final, mean over earlier ones."""
    final = scores[-1]
    lost = [max(row[j] for row in scores[j:]) - final[j] for j in range(len(final) - 1)]
    return {
        "new": round(fmean(row[-1] for row in scores), 4),
        "final": round(fmean(final), 4),
        "forgetting": round(fmean(lost), 4),
    }


def _rows(trainer: Trainer, examples: Sequence[Example], folder: Path) -> Rows:
    sequences = [[*example.prompt, *example.answer] for example in examples]
    shared = common_beginning(examples)
    states = FrozenStates(
        trainer.model, trainer.first, sequences, limit=1 << 28, folder=folder, shared=shared
    )
    lengths = [len(sequence) - shared for sequence in sequences]
    return Rows(trainer.model, trainer.first, states, lengths, [len(example.answer) for example in examples])


def _score(trainer: Trainer, examples: Sequence[Example], folder: Path) -> tuple[float, float]:
    rows = _rows(trainer, examples, folder)
    found = measure(rows, range(len(rows.lengths)), trainer.task.tokens)
    return found.exact, found.loss
