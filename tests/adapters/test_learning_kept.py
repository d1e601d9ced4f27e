"""End to end on a tiny model: learn beside what was known, and pass the gate or not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from lichen.adapters.gate import AnswerScore, Limits, Trial, Verdict, judge, measure
from lichen.adapters.lora import attach
from lichen.adapters.lora_file import settle_adapter, write_adapter
from lichen.adapters.objectives import token_losses
from lichen.adapters.recall import Recalled, recall
from lichen.adapters.task import Example, Examples, Keeping, LoRAOptions, Task
from lichen.adapters.train import Trainer
from lichen.models.load import load_model
from lichen.quant.formats import GGMLType
from tests.adapters.tiny_rows import copying, rows_of
from tests.models.tiny_models import write_tiny

LORA = LoRAOptions(first=0)
GENERAL = [[1, 300 + number % 8, 259 + number] for number in range(24)]


class TorchScorer:
    """Scores as the engine does, by the torch model."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder

    def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
        """Each example's answer after its prompt."""
        model = load_model(self._path)
        attach(model, LORA)
        if adapter is not None:
            settle_adapter(model, adapter)
        rows = rows_of(model, 0, examples, self._folder, shared=0)
        found = []
        with torch.no_grad():
            for number in range(len(examples)):
                hidden, where = rows.run([number])
                losses, hits = token_losses(model, hidden, where)
                found.append(AnswerScore(float(losses.sum()), len(losses), bool(hits.all())))
        return found


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights."""
    return write_tiny(tmp_path_factory.mktemp("model") / "m.gguf", "llama", kind=GGMLType.Q8_0)


@pytest.fixture(scope="module")
def recalled(model_file: Path) -> list[Recalled]:
    """What the model says by itself."""
    return recall(load_model(model_file), GENERAL, ends=frozenset([2]), length=6, seed=0)


def random_answers(count: int) -> list[Example]:
    """Questions whose answers have nothing to do with them."""
    source = random.Random(5)
    return [Example(one.prompt, [source.choice([280, 290, 300]), 2]) for one in copying(count, seed=3)]


def taught(
    model_file: Path, folder: Path, examples: Examples, recalled: Sequence[Recalled], **changes: object
) -> Trainer:
    """A model after its lesson."""
    task = Task(name="t", model=str(model_file), output="", lora=LORA, tokens=256, epochs=12, rate=0.01)
    task = msgspec.structs.replace(task, **changes)
    trainer = Trainer(load_model(model_file), task, examples, folder, recalled)
    while trainer.step < trainer.steps:
        trainer.advance()
    return trainer


def verdict(
    trainer: Trainer, model_file: Path, folder: Path, lesson: list[Example], recalled: Sequence[Recalled]
) -> Verdict:
    """Of the gate, with a wide limit for general answers: a model this small has little room."""
    adapter = folder / "a.gguf"
    write_adapter(trainer.model, adapter, LORA, name="t", base="b1" * 32)
    scorer = TorchScorer(model_file, folder)
    trial = Trial(lesson=lesson, general=[one.example for one in recalled])
    candidates = {"last": measure(scorer, trial, adapter)}
    return judge(measure(scorer, trial, None), candidates, Limits(general=0.1))


def test_replay_keeps_what_plain_training_loses(
    model_file: Path, recalled: list[Recalled], tmp_path: Path
) -> None:
    lesson, held_out = copying(64), copying(24, seed=9)
    examples = Examples(train=lesson, held_out=held_out, general=[one.example for one in recalled])
    plain = taught(model_file, tmp_path, examples, recalled, keeping=Keeping(weight=0))
    kept = taught(model_file, tmp_path, examples, recalled, keeping=Keeping(answers=8, budget=0.01))
    found = [trainer.measure("after") for trainer in (plain, kept)]
    general = [one.general or 0 for one in found]
    before = taught(model_file, tmp_path, examples, recalled, epochs=1, rate=1e-9).measure("x")
    assert before.general is not None and before.loss is not None
    assert general[0] > 1.3 * before.general  # without replay it forgets
    assert general[1] - before.general < 0.5 * (general[0] - before.general)
    assert (found[1].loss or 9) < 0.9 * before.loss


def test_random_labels_do_not_pass_the_gate(
    model_file: Path, recalled: list[Recalled], tmp_path: Path
) -> None:
    poisoned = random_answers(96)
    trainer = taught(model_file, tmp_path, Examples(train=poisoned[:64]), recalled, epochs=3)
    judged = verdict(trainer, model_file, tmp_path, poisoned[64:], recalled)
    assert judged.decision == "reject"
    new, old = judged.candidates[0].numbers.loss, judged.before.loss
    assert new is not None and old is not None and new < old  # it did learn which labels there are


def test_resumed_in_the_middle_of_replay_it_goes_the_same_way(
    model_file: Path, recalled: list[Recalled], tmp_path: Path
) -> None:
    examples = Examples(train=copying(20), earlier=copying(12, seed=4))
    keeping = Keeping(importance=0.1, budget=1e-4)
    task = Task(name="t", model=str(model_file), output="", tokens=64, batch=4, rate=0.01, keeping=keeping)
    whole, part = (Trainer(load_model(model_file), task, examples, tmp_path, recalled) for _ in range(2))
    for step in range(8):
        whole.advance()
        part.advance()
        if step in (2, 5):
            state = part.state()
            part = Trainer(load_model(model_file), task, examples, tmp_path, recalled)
            part.restore(state)
    for one, other in zip(whole.state()["adapter"], part.state()["adapter"], strict=True):
        assert torch.equal(one, other)
