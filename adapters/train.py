"""The training loop: an adapter, its optimizer and its place in the lessons, one step at a time.

A `Trainer` is all of a training's state. Two of the same task and threads go through the same numbers to
the bit, whether one was resumed from a checkpoint (`state`, `restore`) at any step or not.
Not covered: when to train, and whether the result is good enough to be served.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from lichen.adapters import objectives
from lichen.adapters.course import Course, rate_at
from lichen.adapters.events import Measured
from lichen.adapters.frozen import FrozenStates
from lichen.adapters.lora import adapted, attach, parameters
from lichen.adapters.lora_file import settle_adapter
from lichen.adapters.objectives import Rows, Score
from lichen.adapters.prune import Pruned, prune
from lichen.adapters.recall import Recalled
from lichen.adapters.retention import Keeper, give, joined, taken
from lichen.adapters.task import Example, Examples, Task
from lichen.errors import TrainingError
from lichen.models.decoder import Decoder

RATES = {"supervised": 2e-3, "preference": 5e-5}  # the first is measured (docs/log.md)
NORM = 1.0  # longest gradient
BETAS = (0.9, 0.99)  # a shorter memory than usual: trainings here have hundreds of steps
TRIED = 4  # steps before a training whose time is limited
PROBED = 48  # examples that pruning measures on
MEASURED = 128  # held-out examples at most: more would cost minutes and change the second digit


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did. loss: in nats an answer token (of a preference: nats a pair). kept: divergence on
    general answers in nats a token, None where none are replayed. norm: the gradient's before it was clipped.
    tokens: that went through the model."""

    epoch: int
    loss: float
    kept: float | None
    rate: float
    norm: float
    tokens: int


class Trainer:
    """One training of a model, which gets the adapters. folder: where activations are kept meanwhile.

    recalled: the model's own answers to general prompts.
    """

    def __init__(
        self,
        model: Decoder,
        task: Task,
        examples: Examples,
        folder: Path,
        recalled: Sequence[Recalled] = (),
    ) -> None:
        self.model, self.task = model, task
        self.first = attach(model, task.lora, task.seed)
        if task.parent:
            settle_adapter(model, Path(task.parent))
        self.rate = task.rate or RATES[task.objective] * task.multiplier
        self.breathe: Callable[[], None] = lambda: None  # called between the parts of a step or measurement
        self.step = 0
        train = _sides(examples.train) if task.objective == "preference" else examples.train
        spread = _spread(examples.held_out, MEASURED)
        self._train = self._rows(train, task.cache, folder)
        self._held_out = self._rows(spread, task.cache // 4, folder) if spread else None
        measured, replayed = _parted(recalled, bool(examples.general))
        general = examples.general or [one.example for one in measured]
        self._general = self._rows(general, task.cache // 4, folder) if general else None
        learned = _spread(examples.train, PROBED)
        self._probe = self._rows(learned, task.cache // 4, folder)
        self._earlier = self._rows(_spread(examples.earlier, PROBED), 0, folder) if examples.earlier else None
        self._trained = parameters(model)
        self._keeper = self._keeping(replayed, examples.earlier, folder) if task.keeping.weight else None
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=self.rate, betas=BETAS, weight_decay=0.0, foreach=False
        )
        self._course = Course(len(examples.train), task.batch, task.seed)
        self.steps = task.epochs * self._course.steps_an_epoch
        self._reference: Tensor | None = None

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._trained)

    def fit_into(self, seconds: float) -> None:
        """Lower the number of steps to what fits; some are tried, and leave nothing behind.

        What a first epoch adds, the states of examples that were never seen, is told apart: tried steps
        compute them for their neighbours too (`frozen.py`), so they look slower than those that follow.
        """
        state, kept = self._course.state(), None if self._keeper is None else self._keeper.state()
        fresh, known = 0.0, []
        for _ in range(TRIED):
            chosen = self._course.next()
            fresh += self._timed(chosen)
            known.append(self._timed(chosen))
            fresh -= known[-1]
        self._optimizer.zero_grad()
        self._course.restore(state)
        if self._keeper is not None and kept is not None:
            self._keeper.restore(kept)
        step = statistics.median(known)
        new = max(0.0, fresh) * self.task.batch / max(1, self._train.known)  # a step of the first epoch more
        epoch = self._course.steps_an_epoch
        fitting = seconds / (step + new)
        if fitting > epoch:
            fitting = epoch + (seconds - epoch * (step + new)) / step
        self.steps = max(1, min(self.steps, int(fitting)))

    def _timed(self, chosen: list[int]) -> float:
        """Seconds that the gradients of a step take, which are then forgotten."""
        started = time.monotonic()
        self._gradients(chosen)
        if self._keeper is not None:
            joined(taken(self._trained), self._keeper.step().gradient)
        return time.monotonic() - started

    def advance(self) -> Step:
        """One step. Raises TrainingError when the loss is no number any more."""
        rate = rate_at(self.step, self.steps, self.rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        chosen = self._course.next()
        loss, tokens = self._gradients(chosen)
        kept: float | None = None
        if self._keeper is not None:
            learn, keep = taken(self._trained), self._keeper.step()
            give(self._trained, joined(learn, keep.gradient))
            kept, tokens = keep.loss, tokens + keep.tokens
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, NORM, foreach=False))
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise TrainingError(
                f"The loss of step {self.step + 1} is no number.", hint="Train again with a lower rate."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        for _, layer in adapted(self.model):
            layer.step_aside()
        self.step += 1
        return Step(self._course.epoch, loss, kept, rate, norm, tokens)

    def prune(self) -> Pruned:
        """Take out of the adapters what does not pay; the end of a training, which cannot go on after it.

        Measured on what was learned and on what is kept, never on what is held out.
        """
        kept = [rows for rows in (self._general, self._earlier) if rows is not None]
        return prune(self.model, [self._probe, *kept], allowed=self.task.prune, tokens=self.task.tokens)

    def measure(self, when: str) -> Measured:
        """Losses on the held-out and the general examples."""
        told = Measured(when)
        if (score := self._score(self._held_out)) is not None:
            told = msgspec.structs.replace(told, loss=score.loss, exact=score.exact)
        if (score := self._score(self._general)) is not None:
            told = msgspec.structs.replace(told, general=score.loss)
        return told

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, as tensors and plain values; later steps do not change it."""
        return {
            "step": self.step,
            "steps": self.steps,
            "course": self._course.state(),
            "keeper": None if self._keeper is None else self._keeper.state(),
            "adapter": [parameter.detach().clone() for parameter in self._trained],
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` of the same task was taken."""
        self.step, self.steps = state["step"], state["steps"]
        self._course.restore(state["course"])
        if self._keeper is not None:
            self._keeper.restore(state["keeper"])
        for parameter, stored in zip(self._trained, state["adapter"], strict=True):
            parameter.data.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])

    def _keeping(
        self, recalled: Sequence[Recalled], earlier: Sequence[Example], folder: Path
    ) -> Keeper | None:
        task = self.task
        general = [one.example for one in recalled] if task.keeping.answers else []
        old = earlier if task.keeping.earlier else []
        if not general and not old:
            return None
        return Keeper(
            self._rows(general, task.cache // 4, folder) if general else None,
            recalled,
            self._rows(old, task.cache // 4, folder) if old else None,
            [[layer.a, layer.b] for _, layer in adapted(self.model)],
            task,
        )

    def _rows(self, examples: Sequence[Example], cache: int, folder: Path) -> Rows:
        sequences = [[*example.prompt, *example.answer] for example in examples]
        shared = objectives.common_beginning(examples)
        states = FrozenStates(self.model, self.first, sequences, limit=cache, folder=folder, shared=shared)
        answers = [len(example.answer) for example in examples]
        return Rows(
            self.model, self.first, states, [len(sequence) - shared for sequence in sequences], answers
        )

    def _gradients(self, chosen: list[int]) -> tuple[float, int]:
        """Gather the gradients of a step, a part that fits in memory at a time; the loss, and tokens."""
        if self.task.objective == "preference":
            return self._preference_gradients(chosen)
        loss, total = 0.0, self._train.answer_tokens(chosen)
        for part in self._train.parts(chosen, self.task.tokens):
            self.breathe()
            share = objectives.supervised(self._train, part, total)
            torch.autograd.backward(share)
            loss += float(share.detach())
        return loss, sum(self._train.lengths[number] for number in chosen)

    def _preference_gradients(self, chosen: list[int]) -> tuple[float, int]:
        if self._reference is None:
            self._reference = objectives.reference_log_probabilities(self._train, self.task.tokens)
        loss, tokens = 0.0, 0
        for pair in chosen:
            tokens += self._train.lengths[2 * pair] + self._train.lengths[2 * pair + 1]
        for pairs in _pairs(chosen, self._train.lengths, self.task.tokens):
            self.breathe()
            share = objectives.preference(self._train, pairs, len(chosen), self.task.beta, self._reference)
            torch.autograd.backward(share)
            loss += float(share.detach())
        return loss, tokens

    def _score(self, rows: Rows | None) -> Score | None:
        if rows is None:
            return None
        return objectives.measure(rows, range(len(rows.lengths)), self.task.tokens, self.breathe)


def _parted(recalled: Sequence[Recalled], all_kept: bool) -> tuple[list[Recalled], list[Recalled]]:
    """What measures and what is replayed: every fourth answer measures, unless other examples do."""
    if all_kept:
        return [], list(recalled)
    return list(recalled[::4]), [one for number, one in enumerate(recalled) if number % 4]


def _sides(pairs: Sequence[Example]) -> list[Example]:
    """The preferred and the rejected answer of each pair, one after the other."""
    both = ((Example(pair.prompt, pair.answer), Example(pair.prompt, pair.rejected)) for pair in pairs)
    return list(chain.from_iterable(both))


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` of them, evenly from first to last."""
    taken = min(count, len(examples))
    return [examples[index * len(examples) // taken] for index in range(taken)]


def _pairs(chosen: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut pairs into parts of at most so many tokens."""
    parts: list[list[int]] = []
    size = 0
    for pair in sorted(chosen, key=lambda pair: (lengths[2 * pair], pair)):
        both = lengths[2 * pair] + lengths[2 * pair + 1]
        if not parts or size + both > tokens:
            parts.append([])
            size = 0
        parts[-1].append(pair)
        size += both
    return parts
