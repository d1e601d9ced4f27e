"""What keeps a training from forgetting: replay, steps that hurt neither aim, and a price on what matters.

The keep objective has two parts. On general prompts, the divergence from what the model itself thought
possible (`recall.py`); on examples of earlier lessons, their cross entropy. Its gradient and the lesson's
are joined by a step that does not go against either. `Importance` holds back what answers depend on, also
where no replay looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lichen.adapters.course import Course
from lichen.adapters.objectives import Rows, supervised
from lichen.adapters.recall import Recalled
from lichen.adapters.task import Task
from lichen.models.loss import sum_of_parts

PACE = 0.05  # by which share the weight changes in a step, at the most
MEMORY = 0.9  # of the divergence from step to step: a step sees a few answers only
HEAVIEST = 10  # times the least weight
LEAST = 1e-6  # probability of all but the kept continuations, at the least: its logarithm must be finite


def joined(learn: Tensor, keep: Tensor) -> Tensor:
    """One direction from two gradients, each float32 [parameters].

    `keep` counts for no more than `learn`: a weight that has grown makes it tens of times longer, and steps,
    whose length is bounded, would no longer learn. Then PCGrad (Yu et al., 2020, arXiv:2001.06782): where
    they point apart each loses what goes against the other; the sum then lowers both to first order.
    """
    keep = keep * torch.clamp(learn.norm() / keep.norm().clamp_min(LEAST**2), max=1.0)
    inner = torch.dot(learn, keep)
    if inner >= 0:
        return learn + keep
    return learn + keep - inner / torch.dot(keep, keep) * keep - inner / torch.dot(learn, learn) * learn


def divergence(rows: Rows, numbers: Sequence[int], recalled: Sequence[Recalled], total: int) -> Tensor:
    """KL from what was recalled to the model with adapters, in nats: a share of the mean over `total` tokens.

    Continuations that were not kept count as one; so it is a lower bound, and zero where nothing changed.
    """
    hidden, where = rows.run(numbers)
    likely = torch.cat([recalled[number].likely for number in numbers]).long()  # [n, TOP]
    logs = torch.cat([recalled[number].logs for number in numbers])  # [n, TOP]
    rest = (1 - logs.exp().sum(-1)).clamp_min(LEAST)  # [n]

    def loss(piece: Tensor, part: slice) -> Tensor:
        now = rows.model.logits(piece).log_softmax(-1).gather(-1, likely[part])
        now_rest = (1 - now.exp().sum(-1)).clamp_min(LEAST)
        kept = (logs[part].exp() * (logs[part] - now)).sum()
        return kept + (rest[part] * (rest[part] / now_rest).log()).sum()

    return sum_of_parts(hidden[where.positions], loss, rows.model.vocabulary) / total


class Importance:
    """How much the model's answers depend on each trained number, and the price of moving it.

    As in arXiv:2501.13669: element-wise importance F from a record of gradients on general answers, a
    coefficient c a layer from its share of all importance, and the penalty sum c F (theta - start)^2 / 2.
    F is the diagonal of the Fisher information, since the answers are the model's own; c F has the mean 1.
    """

    def __init__(self, rows: Rows, layers: Sequence[Sequence[nn.Parameter]], tokens: int) -> None:
        """Measured at the parameters as they are. rows: with the model's own answers; tokens: at once."""
        self._trained = list(chain.from_iterable(layers))
        self._start = [parameter.detach().clone() for parameter in self._trained]
        squares = [torch.zeros_like(parameter) for parameter in self._trained]
        for part in rows.parts(range(len(rows.lengths)), tokens):
            torch.autograd.backward(supervised(rows, part, 1))
            for square, parameter in zip(squares, self._trained, strict=True):
                if parameter.grad is not None:
                    square.addcmul_(parameter.grad, parameter.grad)
                parameter.grad = None
        sums = iter([float(square.sum()) for square in squares])
        shares = [sum(next(sums) for _ in layer) for layer in layers]
        weights = iter(squares)
        paired = zip(layers, shares, strict=True)
        self.weights = [next(weights) * share for layer, share in paired for _ in layer]
        mean = sum(float(weight.sum()) for weight in self.weights) / sum(w.numel() for w in self.weights)
        for weight in self.weights:
            weight.div_(max(mean, LEAST**2))

    def gradient(self) -> Tensor:
        """Of the penalty, at the parameters as they are: float32 [parameters]."""
        moved = zip(self.weights, self._trained, self._start, strict=True)
        return torch.cat([(weight * (now.detach() - start)).flatten() for weight, now, start in moved])


@dataclass(frozen=True, slots=True)
class Kept:
    """What the keep objective says at one step. gradient: float32 [parameters]; loss: divergence in nats a
    token; tokens: that went through the model."""

    gradient: Tensor
    loss: float
    tokens: int


class Keeper:
    """The keep objective over a training.

    The weight of the divergence grows while it is over its budget, and shrinks again below: a bound instead
    of a trade, which needs no tuning to the lesson (the multiplier of a constraint, after Lagrange).
    """

    def __init__(
        self,
        general: Rows | None,
        recalled: Sequence[Recalled],
        earlier: Rows | None,
        layers: Sequence[Sequence[nn.Parameter]],
        task: Task,
    ) -> None:
        """general: rows of what was recalled; earlier: of old lessons; layers: what is trained."""
        self._recalled, self._options, self._tokens = recalled, task.keeping, task.tokens
        self._trained = list(chain.from_iterable(layers))
        self._general = _Replay(general, task.keeping.answers, task.seed + 1) if general else None
        self._earlier = _Replay(earlier, task.keeping.earlier, task.seed + 2) if earlier else None
        answered = sum(len(one.example.answer) for one in recalled)
        self._allowed = task.keeping.budget * sum(one.loss for one in recalled) / max(1, answered)
        self._weight, self._average = task.keeping.weight, 0.0
        priced = task.keeping.importance > 0 and general is not None
        self._importance = Importance(general, layers, task.tokens) if priced and general else None

    def step(self) -> Kept:
        """The keep gradient on the next examples; parameters have no gradient before it, and none after."""
        loss, tokens = 0.0, 0
        if (replay := self._general) is not None:
            chosen, total = replay.next()
            for part in replay.rows.parts(chosen, self._tokens):
                share = divergence(replay.rows, part, self._recalled, total)
                torch.autograd.backward(share * self._weight)
                loss += float(share.detach())
            tokens += sum(replay.rows.lengths[number] for number in chosen)
            self._balance(loss)
        if (replay := self._earlier) is not None:
            chosen, total = replay.next()
            for part in replay.rows.parts(chosen, self._tokens):
                torch.autograd.backward(supervised(replay.rows, part, total))
            tokens += sum(replay.rows.lengths[number] for number in chosen)
        gradient = taken(self._trained)
        if self._importance is not None:
            gradient.add_(self._importance.gradient(), alpha=self._options.importance)
        return Kept(gradient, loss, tokens)

    def _balance(self, loss: float) -> None:
        self._average = MEMORY * self._average + (1 - MEMORY) * loss
        over = min(1.0, self._average / max(self._allowed, LEAST) - 1)
        least = self._options.weight
        self._weight = min(HEAVIEST * least, max(least, self._weight * math.exp(PACE * over)))

    def state(self) -> dict[str, Any]:
        """All that decides what comes next."""
        courses = [replay and replay.course.state() for replay in (self._general, self._earlier)]
        return {"courses": courses, "weight": self._weight, "average": self._average}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._weight, self._average = state["weight"], state["average"]
        for replay, stored in zip((self._general, self._earlier), state["courses"], strict=True):
            if replay is not None:
                replay.course.restore(stored)


class _Replay:
    """Some of the rows at every step, in an order of their own."""

    def __init__(self, rows: Rows, batch: int, seed: int) -> None:
        self.rows, self.course = rows, Course(len(rows.lengths), batch, seed)

    def next(self) -> tuple[list[int], int]:
        """Numbers of the next ones, and how many tokens their answers have."""
        chosen = self.course.next()
        return chosen, self.rows.answer_tokens(chosen)


def taken(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Their gradients as one vector, float32 [parameters], which they then have no more."""
    found = []
    for parameter in parameters:
        found.append((torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten())
        parameter.grad = None
    return torch.cat(found)


def give(parameters: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """The opposite of `taken`."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, torch.split(gradient, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
