"""The gate over the real default model: what the engine scores, and whom it lets serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lichen.adapters.gate import AnswerScore, Limits
from lichen.adapters.registry import Registry
from lichen.adapters.task import Example, Examples
from lichen.adapters.versions import Version
from lichen.cli.adapters import gate_picture
from lichen.errors import GateError
from lichen.runtime.gating import OUTPUTS, EngineScorer, settle
from lichen.runtime.native import Model
from lichen.runtime.scoring import NativeScorer
from tests.adapters.made_adapters import add_made, write_made
from tests.models.tiny_models import write_tiny

TEXTS = [
    ("The capital of France is", " Paris."),
    ("The capital of France was", " Paris, long ago."),
    ("One two three four five", " six seven eight nine ten"),
    ("Roses are red, violets", " are blue."),
    ("Once upon a time there", " was a king who had a daughter."),
    ("The capital of France is not", " Berlin. " + "It is said again. " * 12),
]


@pytest.fixture(scope="module")
def examples(model_path: Path) -> list[Example]:
    model = Model(model_path)
    found = [
        Example(
            model.tokenize(prompt, special=False, add_bos=False),
            model.tokenize(answer, special=False, add_bos=False),
        )
        for prompt, answer in TEXTS
    ]
    model.close()
    return found


@pytest.fixture(scope="module")
def scorer(model_path: Path) -> Iterator[EngineScorer]:
    scorer = EngineScorer(model_path, window=256, threads=1)
    yield scorer
    scorer.close()


def test_a_score_is_what_the_logits_say(
    model_path: Path, scorer: EngineScorer, examples: list[Example]
) -> None:
    assert len(examples[-1].answer) > OUTPUTS
    plain = NativeScorer(model_path, window=256, threads=1)
    for example, score in zip(examples, scorer.score(examples, None), strict=True):
        whole = [*example.prompt, *example.answer]
        logits = plain.logits(whole)[len(example.prompt) - 1 : -1].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        loss = -logs[np.arange(len(example.answer)), example.answer].sum()
        # Batches of another shape round differently, and activations are rounded to 8 bits.
        assert score.loss == pytest.approx(loss, rel=0.05, abs=0.2)
        assert score.tokens == len(example.answer)
    plain.close()


def test_an_adapter_counts_only_while_it_is_on(
    model_path: Path, scorer: EngineScorer, examples: list[Example], tmp_path: Path
) -> None:
    adapter = write_made(tmp_path / "a.gguf", model_path, 3, strength=0.3)
    write_made(tmp_path / "b.gguf", model_path, 4)
    scorer.score(examples[:1], tmp_path / "b.gguf")  # a change empties the cache, so that batches are alike
    before = scorer.score(examples, None)
    with_it = scorer.score(examples, adapter)
    assert sum(abs(a.loss - b.loss) for a, b in zip(before, with_it, strict=True)) > 5
    assert scorer.score(examples, None) == before


def test_its_own_answers_are_exact(scorer: EngineScorer, examples: list[Example]) -> None:
    answers = scorer.answers([example.prompt for example in examples[:3]], ends=[])
    assert all(len(answer.answer) == 32 for answer in answers)
    again = scorer.answers([examples[0].prompt], ends=[answers[0].answer[2]])[0]
    assert again.answer == answers[0].answer[: 1 + answers[0].answer.index(answers[0].answer[2])]


class Known:
    """In the place of the engine: losses a token by the adapter's digest."""

    losses: ClassVar[dict[str, float]] = {}

    def __init__(self, model: Path, *, window: int, threads: int) -> None:
        self.tell: Callable[[], None] = lambda: None

    def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
        loss = 4.0 if adapter is None else self.losses[adapter.parent.name]
        return [AnswerScore(loss * len(one.answer), len(one.answer), False) for one in examples]

    def answers(self, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> list[Example]:
        return []

    def close(self) -> None:
        return


@pytest.mark.parametrize(
    ("half", "end", "served", "kept", "serves"),
    [
        (1.0, 2.0, None, "half", "half"),
        (2.0, 1.0, None, "end", "end"),
        (5.0, 6.0, None, "end", None),  # none may serve: that of the end waits for a person
        (3.0, 4.5, 4.0, "half", "half"),
    ],
)
def test_of_one_training_only_the_better_stays(
    half: float,
    end: float,
    served: float | None,
    kept: str,
    serves: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lichen.runtime.gating.EngineScorer", Known)
    registry, model = Registry(tmp_path / "adapters"), write_tiny(tmp_path / "m.gguf", "llama")
    versions = {
        name: add_made(registry, "mine", model, seed, blocks=range(2))
        for seed, name in enumerate(("before", "half", "end"))
    }
    losses = {"before": served or 9.0, "half": half, "end": end}
    monkeypatch.setattr(Known, "losses", {versions[name].digest: loss for name, loss in losses.items()})
    if served is not None:
        registry.promote("mine", versions["before"].digest)
    lesson = [Example([1], [2, 3])] * 8
    verdict = settle(
        registry,
        versions["end"],
        model,
        Examples(train=lesson, held_out=lesson),
        Limits(),
        threads=1,
        half=versions["half"],
    )
    assert (verdict.kept.name, verdict.kept.checkpoint) == (versions[kept].digest, kept)
    assert registry.versions("mine") == [versions["before"], versions[kept]]
    active = registry.active("mine")
    assert active == (versions[serves] if serves else None)
    note = registry.notes("mine", versions[kept].digest)[-1]
    assert {one["checkpoint"] for one in note.values["candidates"]} == {"half", "end"}
    assert len(gate_picture(note.values)) >= 5


def test_with_too_little_to_measure_on_half_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lichen.runtime.gating.EngineScorer", Known)
    registry, model = Registry(tmp_path / "adapters"), write_tiny(tmp_path / "m.gguf", "llama")
    half, end = (add_made(registry, "mine", model, seed, blocks=range(2)) for seed in (1, 2))
    few = Examples(train=[Example([1], [2])], held_out=[Example([1], [2])])
    with pytest.raises(GateError):
        settle(registry, end, model, few, Limits(), threads=1, half=half)
    assert registry.versions("mine") == [end]


@pytest.mark.slow
def test_a_bad_version_does_not_serve_and_a_better_one_takes_its_place(
    model_path: Path, examples: list[Example], tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "adapters")
    bad = add_made(registry, "mine", model_path, 1, strength=0.3)
    lesson = Examples(train=examples, held_out=examples[:5] * 4, asked=[one.prompt for one in examples[:2]])
    told: list[tuple[str, int, int]] = []

    def settled(version: Version, limits: Limits) -> list[str]:
        verdict = settle(
            registry, version, model_path, lesson, limits, threads=1, progress=lambda *a: told.append(a)
        )
        return verdict.candidates[0].faults

    better = add_made(registry, "mine", model_path, 2, strength=0.001)
    assert settled(bad, Limits())
    assert registry.active("mine") is None
    note = registry.notes("mine", bad.digest)[0]
    assert note.kind == "gate" and note.values["candidates"][0]["faults"]
    assert told[-1][1] == told[-1][2] > 20

    registry.promote("mine", bad.digest)  # by hand, whatever the gate said
    assert settled(better, Limits(general=1.0)) == [], "beside it anything is better"
    assert registry.active("mine") == better


def test_too_little_to_measure_on_is_noted(model_path: Path, examples: list[Example], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "adapters")
    version = add_made(registry, "mine", model_path, 1, rank=1)
    lesson = Examples(train=examples, held_out=examples[:2])
    with pytest.raises(GateError, match="2 answers to measure on"):
        settle(registry, version, model_path, lesson, Limits(), threads=1)
    assert "2 answers" in str(registry.notes("mine", version.digest)[0].values["reason"])
