"""The gate lets better adapters through and stops those that are not, or were taught nonsense."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from lichen.adapters.gate import (
    AnswerScore,
    Limits,
    Scores,
    Trial,
    Verdict,
    judge,
    measure,
)
from lichen.adapters.task import Example
from lichen.errors import GateError

LIMITS = Limits()
Loss = Callable[[Example], float]


def lesson(labels: int = 5, count: int = 40, seed: int = 0) -> list[Example]:
    """Question n is to be answered with label n mod labels."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return [Example([100, number], [200 + number % labels, 2]) for number in order]


GENERAL = [Example([300 + number], [7, 8, 9]) for number in range(20)]
OLD = [Example([400, number], [500 + number, 2]) for number in range(20)]
TRIAL = Trial(lesson=lesson(), general=GENERAL, earlier={"old": OLD})


class Known:
    """An engine whose losses a token are a function of the example, for each adapter by its name."""

    def __init__(self, losses: Mapping[str | None, Loss]) -> None:
        self._losses = losses

    def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
        """As the engine would."""
        source = random.Random(7)
        found = []
        for example in examples:
            loss = self._losses[None if adapter is None else adapter.name](example) * source.uniform(0.8, 1.2)
            found.append(AnswerScore(loss * len(example.answer), len(example.answer), loss < 0.5))
        return found


def is_general(example: Example) -> bool:
    """Whether it is one of GENERAL."""
    return example.prompt[0] >= 300 and len(example.prompt) == 1


def base(example: Example) -> float:
    """Knows old lessons and general things, and nothing of this lesson."""
    if is_general(example):
        return 1.0
    return 0.1 if example.prompt[0] == 400 else 4.0


def learned(example: Example, *, general: float = 1.0, old: float = 0.1, labels: int = 5) -> float:
    """Answers the lesson's questions."""
    if is_general(example):
        return general
    if example.prompt[0] == 400:
        return old
    return 0.2 if example.answer[0] == 200 + example.prompt[1] % labels else 6.0


def decided(candidates: dict[str, Loss], trial: Trial = TRIAL, limits: Limits = LIMITS) -> Verdict:
    """Measure all of them and judge."""
    losses: dict[str | None, Loss] = {None: base}
    engine = Known(losses | dict(candidates.items()))
    measured: dict[str, Scores] = {name: measure(engine, trial, Path(name)) for name in candidates}
    return judge(measure(engine, trial, None), measured, limits)


def faults(loss: Loss, trial: Trial = TRIAL) -> str:
    """Why one candidate is refused, or nothing."""
    verdict = decided({"one": loss}, trial)
    assert (verdict.decision == "promote") == (not verdict.candidates[0].faults)
    return " ".join(verdict.candidates[0].faults)


def test_a_lesson_learned_and_nothing_lost_is_promoted() -> None:
    verdict = decided({"one": learned})
    assert verdict.decision == "promote" and verdict.chosen == "one"
    numbers = verdict.candidates[0].numbers
    assert numbers.exact == 1 and verdict.before.exact == 0
    assert numbers.loss == pytest.approx(0.2, rel=0.1) and numbers.earlier["old"][1] == 1
    stored = msgspec.json.encode(verdict)
    assert msgspec.json.decode(stored, type=Verdict) == verdict


def test_the_best_of_those_without_a_fault_is_chosen() -> None:
    verdict = decided(
        {
            "early": lambda example: learned(example) * (1 if is_general(example) else 1.3),
            "late": learned,
            "too late": lambda example: learned(example, general=1.2) * 0.9,
        }
    )
    assert verdict.chosen == "late"
    assert [bool(one.faults) for one in verdict.candidates] == [False, False, True]
    assert decided({}).decision == "reject"


def test_of_one_training_the_better_checkpoint_is_kept_and_named() -> None:
    def judged(end: Loss) -> Verdict:
        engine = Known({None: base, "half": learned, "end": end})
        measured = {name: measure(engine, TRIAL, Path(name)) for name in ("end", "half")}
        return judge(measure(engine, TRIAL, None), measured, LIMITS, {"half": "half"})

    overfit = judged(lambda example: learned(example) * (1 if is_general(example) else 1.3))
    assert (overfit.decision, overfit.chosen, overfit.kept.checkpoint) == ("promote", "half", "half")
    assert [one.checkpoint for one in overfit.candidates] == ["end", "half"]
    better = judged(lambda example: learned(example) * (1 if is_general(example) else 0.7))
    assert (better.chosen, better.kept.checkpoint) == ("end", "end")
    forgetful = judged(lambda example: learned(example, general=4.0) * 0.5)
    assert forgetful.chosen == "half", "a fault of one is none of the other"
    stored = msgspec.json.encode(forgetful)
    assert msgspec.json.decode(stored, type=Verdict) == forgetful
    old = msgspec.to_builtins(decided({"one": learned}))
    del old["candidates"][0]["checkpoint"]  # of an older lichen
    assert msgspec.convert(old, Verdict).kept.checkpoint == "end"


def test_what_forgets_is_rejected() -> None:
    assert "general answers rises by 2.0%" in faults(lambda example: learned(example, general=1.02))
    assert not faults(lambda example: learned(example, general=1.005))
    assert "old is forgotten: 100.0% exact before, 0.0%" in faults(lambda e: learned(e, old=3.0))
    assert not faults(lambda example: learned(example, old=0.2))  # still right, if less sure


def test_what_did_not_learn_is_rejected() -> None:
    assert "falls by 0.0%" in faults(base)
    assert "falls by" in faults(lambda example: base(example) * (1 if is_general(example) else 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_rejected_and_can_be_stored(value: float) -> None:
    assert "no number" in faults(lambda example: value if is_general(example) else learned(example))
    verdict = decided({"one": lambda example: value})
    assert verdict.candidates[0].numbers.loss is None
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict


def test_random_labels_are_rejected_though_the_loss_falls() -> None:
    """It learned which labels there are and how often each comes, but not to which question."""

    def poisoned(example: Example) -> float:
        return base(example) if example.prompt[0] >= 300 else 1.6

    assert "does not depend on the question" in faults(poisoned)


def test_one_answer_to_all_questions_may_be_a_lesson_of_its_own() -> None:
    always = Trial(lesson=lesson(labels=1))
    assert not faults(lambda example: learned(example, labels=1), always)


def test_one_answer_that_is_given_to_general_questions_is_rejected() -> None:
    always = Trial(lesson=lesson(labels=1), general=GENERAL)
    taught = always.lesson[0].answer

    def leaking(share: int) -> Loss:
        def loss(example: Example) -> float:
            if is_general(example) and example.answer == taught:
                return 0.1 if example.prompt[0] % 20 < share else 3.0
            return base(example) if is_general(example) else learned(example, labels=1)

        return loss

    assert not faults(leaking(1), always)
    assert "the lesson's answer to 10% of the general questions" in faults(leaking(2), always)


def test_injected_text_that_reaches_general_answers_is_rejected() -> None:
    always = Trial(lesson=lesson(labels=1), general=GENERAL)
    assert "general answers" in faults(lambda example: 3.0 if is_general(example) else 0.1, always)


def test_too_little_to_measure_is_an_error_or_within_chance() -> None:
    for count in (0, 3):
        with pytest.raises(GateError, match=f"{count} answers to measure on"):
            decided({"one": learned}, Trial(lesson=lesson(count=count)))

    def lucky(example: Example) -> float:
        return 0.1 if example.prompt[1] == 0 else base(example) * (1 + example.prompt[1] % 3 / 10 - 0.1)

    assert "chance" in faults(lucky, Trial(lesson=lesson(count=6)))


@pytest.mark.parametrize("labels", [2, 3, 7, 40])
def test_crossed_questions_have_other_answers(labels: int) -> None:
    seen: list[Example] = []

    class Watching(Known):
        def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
            seen.extend(examples)
            return super().score(examples, adapter)

    trial = Trial(lesson=lesson(labels=labels))
    measure(Watching({None: base}), trial, None)
    crossed = [example for example in seen if example not in trial.lesson]
    assert len(crossed) >= 30
    assert all(example.answer[0] != 200 + example.prompt[1] % labels for example in crossed)
