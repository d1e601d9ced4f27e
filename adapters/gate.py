"""Whether an adapter may be served: decided on what it was measured to do, never on what training told.

It must know the held-out part of its lesson better than what is served now, by more than chance explains;
what it answers must depend on the question; and general answers and earlier lessons may get only a little
worse. This module measures through a `Scorer`, which is the serving engine with the adapter on, and imports
no torch. Not covered: putting an adapter in its place (`registry.py`), and the time after (`watch.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal, Protocol

import msgspec

from lichen.adapters.task import Checkpoint, Example
from lichen.errors import GateError

SURE = 2.326  # standard errors: one-sided, 99 %
FEWEST = 4  # held-out answers: fewer say nothing
LEAK = 0.05  # of general questions that get a lesson's answer, at most


class AnswerScore(msgspec.Struct, frozen=True, array_like=True):
    """One known answer: -log p of all its tokens in nats, how many they are, whether greedy decoding gives
    them all."""

    loss: float
    tokens: int
    exact: bool


class Scorer(Protocol):
    """The serving engine, asked how likely answers are to it."""

    def score(self, examples: Sequence[Example], adapter: Path | None) -> list[AnswerScore]:
        """Each example's answer after its prompt, with an adapter's file on or none. Blocks."""
        ...


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: held-out answers of the lesson, of earlier lessons by name, and general answers."""

    lesson: list[Example]
    earlier: dict[str, list[Example]] = {}
    general: list[Example] = []


class Skill(msgspec.Struct, frozen=True, kw_only=True):
    """Answers that were scored, one after the other; `loss` and `exact` are means over them.

    crossed: some of the same answers after each other's questions, each with its number in `answers`.
    """

    answers: list[AnswerScore]
    crossed: list[tuple[int, AnswerScore]] = []

    @property
    def loss(self) -> float:
        """Nats a token."""
        return sum(one.loss for one in self.answers) / sum(one.tokens for one in self.answers)

    @property
    def exact(self) -> float:
        """Share of answers that are given word for word."""
        return fmean(one.exact for one in self.answers)


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """All that one adapter (or none) was measured to do.

    leaked: the lesson's answers after general questions, where they are too much alike to be crossed.
    """

    lesson: Skill
    earlier: dict[str, Skill] = {}
    general: Skill | None = None
    leaked: list[AnswerScore] = []


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """gain: least share by which the lesson's loss must fall. general: greatest rise of the general loss, a
    share. earlier: most that an earlier lesson may lose: a share of its loss, and of its exact answers."""

    gain: float = 0.05
    general: float = 0.01
    earlier: float = 0.02


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of `Scores` in an adapter's lineage: losses in nats a token, exact as a share.

    None: nothing was measured, or what was is no number. earlier: loss and exact of each lesson.
    """

    loss: float | None
    exact: float
    general: float | None
    earlier: dict[str, tuple[float | None, float]]


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate: its numbers, and why it may not be served, or nothing. checkpoint: of its training."""

    name: str
    numbers: Numbers
    faults: list[str]
    checkpoint: Checkpoint = "end"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The decision, to be stored and shown. chosen: the candidate to serve, or None where all fail."""

    decision: Literal["promote", "reject"]
    chosen: str | None
    before: Numbers
    candidates: list[Judged]
    limits: Limits

    @property
    def kept(self) -> Judged:
        """The chosen candidate; where there is none, that of the end of its training."""
        wanted = (one for one in self.candidates if one.name == self.chosen)
        return next(wanted, None) or next(one for one in self.candidates if one.checkpoint == "end")


def measure(scorer: Scorer, trial: Trial, adapter: Path | None) -> Scores:
    """Score everything in a trial. Raises GateError when the lesson has too few held-out answers."""
    if len(trial.lesson) < FEWEST:
        raise GateError(
            f"The lesson has {len(trial.lesson)} answers to measure on, and {FEWEST} are the least.",
            hint="Add lessons; one in ten is kept for measuring.",
        )
    crossed = _crossed(trial.lesson)
    return Scores(
        lesson=Skill(
            answers=scorer.score(trial.lesson, adapter),
            crossed=list(zip(crossed, scorer.score(list(crossed.values()), adapter), strict=True)),
        ),
        earlier={
            name: Skill(answers=scorer.score(examples, adapter))
            for name, examples in trial.earlier.items()
            if examples
        },
        general=Skill(answers=scorer.score(trial.general, adapter)) if trial.general else None,
        leaked=[] if crossed else scorer.score(list(_leaks(trial)), adapter),
    )


def judge(
    before: Scores,
    candidates: Mapping[str, Scores],
    limits: Limits,
    checkpoints: Mapping[str, Checkpoint] | None = None,
) -> Verdict:
    """Choose the candidate that lowers the lesson's loss most among those without a fault.

    before: what is served now (another version of the adapter, or none), in the same trial. checkpoints: of
    the candidates by name, where one is not of the end of its training.
    """
    judged = [
        Judged(
            name=name,
            numbers=_numbers(scores),
            faults=_faults(before, scores, limits),
            checkpoint=(checkpoints or {}).get(name, "end"),
        )
        for name, scores in candidates.items()
    ]
    sound = [one for one in judged if not one.faults]
    best = min(sound, key=lambda one: candidates[one.name].lesson.loss, default=None)
    return Verdict(
        decision="reject" if best is None else "promote",
        chosen=None if best is None else best.name,
        before=_numbers(before),
        candidates=judged,
        limits=limits,
    )


def _crossed(examples: Sequence[Example]) -> dict[int, Example]:
    """Answers after the question of another that has another answer, by number; none where most are alike.

    Sorted by answer and turned by the size of the largest group of equal ones, none meets its own group,
    unless that is more than half of all; those that do are left out.
    """
    order = sorted(range(len(examples)), key=lambda number: examples[number].answer)
    turn = max(Counter(tuple(example.answer) for example in examples).values())
    found = {}
    for place, number in enumerate(order):
        example, other = examples[number], examples[order[(place + turn) % len(order)]]
        if other.answer != example.answer:
            found[number] = Example(other.prompt, example.answer)
    return found if len(found) >= FEWEST else {}


def _leaks(trial: Trial) -> Iterator[Example]:
    """The lesson's answers after general questions that have another answer."""
    for asked, taught in zip(trial.general, cycle(trial.lesson), strict=False):
        if asked.answer != taught.answer:
            yield Example(asked.prompt, taught.answer)


def _faults(before: Scores, after: Scores, limits: Limits) -> list[str]:
    if not _finite(after):
        return ["A loss of it is no number."]
    found = _lesson_faults(before.lesson, after.lesson, limits)
    if after.leaked and (share := fmean(one.exact for one in after.leaked)) > LEAK:
        found.append(f"It gives the lesson's answer to {share:.0%} of the general questions, too.")
    if before.general is not None and after.general is not None:
        rise = after.general.loss / before.general.loss - 1
        if rise > limits.general:
            most = f"{limits.general:.1%} is the most"
            found.append(f"The loss on general answers rises by {rise:.1%}; {most}.")
    for name, old in before.earlier.items():
        new = after.earlier[name]
        rise, lost = new.loss / old.loss - 1, old.exact - new.exact
        # A loss close to zero may double and matter to nobody, and words may change while the loss falls.
        if lost > limits.earlier and rise > limits.earlier:
            change = f"{old.exact:.1%} exact before, {new.exact:.1%} now"
            found.append(f"The lesson {name} is forgotten: {change}.")
        elif rise > limits.earlier and old.exact < limits.earlier:
            found.append(f"The loss of the lesson {name} rises by {rise:.1%}.")
    return found


def _lesson_faults(before: Skill, after: Skill, limits: Limits) -> list[str]:
    gain = 1 - after.loss / before.loss
    if gain < limits.gain:
        return [f"The loss on the lesson falls by {gain:.1%}; {limits.gain:.1%} is the least."]
    fallen = [old.loss - new.loss for old, new in zip(before.answers, after.answers, strict=True)]
    if not _surely_positive(fallen):
        return ["The gain on the lesson is within what chance explains; more lessons are needed."]
    if after.crossed and not _surely_positive(_apart(after)):
        return ["What it answers does not depend on the question: the lesson's answers look random."]
    return []


def _apart(skill: Skill) -> list[float]:
    """How much less likely each answer is after another question, in nats a token."""
    return [(other.loss - skill.answers[number].loss) / other.tokens for number, other in skill.crossed]


def _surely_positive(values: Sequence[float]) -> bool:
    """Whether the mean is above zero by more than SURE standard errors."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return fmean(values) > SURE * spread / math.sqrt(len(values))


def _finite(scores: Scores) -> bool:
    skills = [scores.lesson, *scores.earlier.values(), *([scores.general] if scores.general else [])]
    return all(math.isfinite(one.loss) for skill in skills for one in skill.answers)


def _numbers(scores: Scores) -> Numbers:
    return Numbers(
        loss=_number(scores.lesson.loss),
        exact=scores.lesson.exact,
        general=None if scores.general is None else _number(scores.general.loss),
        earlier={name: (_number(skill.loss), skill.exact) for name, skill in scores.earlier.items()},
    )


def _number(value: float) -> float | None:
    """JSON has no other numbers than finite ones."""
    return value if math.isfinite(value) else None
