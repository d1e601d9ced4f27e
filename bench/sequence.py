"""Five lessons one after another: four groups of banking77's intents, then GSM8K, by three ways to learn.

`ours`: every lesson beside the settled earlier ones, in directions that they do not read, with replay; then
folded in and pruned. `sequential`: one LoRA trained on and on, which is what PEFT does by itself. `o-lora`: a new
adapter a lesson beside the frozen ones, with O-LoRA's penalty 0.5 |A_old A_new^T|_1 (arXiv:2310.14152) and no
replay. Equal steps and batches. A question names no intents to choose from, so nothing tells which lesson it is
of. Scores: exact answers; of GSM8K the final number after the worked steps of the book.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.taught import Schoolbook
from lichen.adapters.frozen import FrozenStates
from lichen.adapters.lora import LoRALinear, adapted, parameters
from lichen.adapters.objectives import Rows, common_beginning, measure
from lichen.adapters.prune import components, prune
from lichen.adapters.recall import Recalled, recall
from lichen.adapters.task import Example, Examples, Keeping, Task
from lichen.adapters.train import Trainer
from lichen.models.load import load_model

ARMS = ("ours", "sequential", "o-lora")
GROUPS = 4  # of intents
EARLIER = 40  # examples of each earlier lesson that are kept for replay
ALLOWED = 0.01  # rise of the loss by pruning
PENALTY = 0.5


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
        base = load_model(model)
        ends = frozenset(book.ends)
        self.recalled = recall(base, book.asked(), ends=ends, length=48, seed=seed)
        self.recalled_examples = [one.example for one in self.recalled[:EARLIER]]
        self.general = [one.example for one in recall(base, book.questions(32), ends=ends, length=48, seed=1)]
        book.close()


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
    """Scores [after lesson i][on lesson j], general losses, and bytes of the adapter."""
    task = Task(name=arm, model=str(model), output="", seed=seed, keeping=_keeping(arm))
    settled: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    numbers: list[torch.Tensor] = []
    earlier: list[Example] = []
    scores, general, sizes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, train in enumerate(lessons.train):
            trainer = _trainer(arm, task, Examples(train=train, earlier=earlier), lessons.recalled, folder)
            _begin(trainer, arm, settled, numbers)
            trainer.steps = steps
            while trainer.step < steps:
                trainer.advance()
            if arm == "ours":
                probes = [train[:EARLIER], earlier, lessons.recalled_examples]
                rows = [_rows(trainer, probe, folder) for probe in probes if probe]
                prune(trainer.model, rows, allowed=ALLOWED, tokens=task.tokens)
            layers = dict(adapted(trainer.model))
            settled = {name: components(*layer.factors()) for name, layer in layers.items()}
            numbers = [parameter.detach().clone() for parameter in parameters(trainer.model)]
            earlier = [*earlier, *train[:EARLIER]]
            tests = [*lessons.test[: number + 1], lessons.general]
            found = [_score(_rows(trainer, test, folder), task.tokens) for test in tests]
            scores.append([round(exact, 4) for exact, _ in found[:-1]])
            general.append(found[-1][1])
            sizes.append(sum(4 * (a.numel() + b.numel()) for a, b in settled.values()))
    return {"arm": arm, "seed": seed, "scores": scores, "general": general, "bytes": sizes, **summary(scores)}


def summary(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """new: mean score of each lesson when it was new. forgetting: best minus final, mean over earlier ones."""
    final = scores[-1]
    lost = [max(row[j] for row in scores[j:]) - final[j] for j in range(len(final) - 1)]
    return {
        "new": round(fmean(row[-1] for row in scores), 4),
        "final": round(fmean(final), 4),
        "forgetting": round(fmean(lost), 4),
    }


def _keeping(arm: str) -> Keeping:
    return Keeping(earlier=4) if arm == "ours" else Keeping(weight=0)


def _trainer(arm: str, task: Task, examples: Examples, recalled: Sequence[Recalled], folder: str) -> Trainer:
    kind = OLoRA if arm == "o-lora" else Trainer
    return kind(load_model(Path(task.model)), task, examples, Path(folder), recalled)


def _begin(
    trainer: Trainer,
    arm: str,
    settled: dict[str, tuple[torch.Tensor, torch.Tensor]],
    numbers: Sequence[torch.Tensor],
) -> None:
    """Go on from the lesson before."""
    if arm == "sequential":
        for parameter, stored in zip(parameters(trainer.model), numbers, strict=False):
            parameter.data.copy_(stored)
        return
    layers: dict[str, LoRALinear] = dict(adapted(trainer.model))
    for name, factors in settled.items():
        if arm == "ours":
            layers[name].settle(*factors)
        else:
            layers[name].settled = factors


def _rows(trainer: Trainer, examples: Sequence[Example], folder: str) -> Rows:
    sequences = [[*example.prompt, *example.answer] for example in examples]
    shared = common_beginning(examples)
    states = FrozenStates(
        trainer.model, trainer.first, sequences, limit=1 << 28, folder=Path(folder), shared=shared
    )
    lengths = [len(sequence) - shared for sequence in sequences]
    return Rows(trainer.model, trainer.first, states, lengths, [len(example.answer) for example in examples])


def _score(rows: Rows, tokens: int) -> tuple[float, float]:
    found = measure(rows, range(len(rows.lengths)), tokens)
    return found.exact, found.loss
