"""What training lowers: the loss of the answers' tokens, or of preferring one answer to another.

Logits are made at the tokens before an answer's alone, a part at a time (`models/loss.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lichen.adapters.frozen import FrozenStates
from lichen.adapters.lora import without_adapters
from lichen.adapters.task import Example
from lichen.models.decoder import Decoder
from lichen.models.loss import LOGIT_BYTES, cross_entropy
from lichen.models.packing import Packed


@dataclass(frozen=True, slots=True)
class Taught:
    """Where the answers of a packed row are: positions and targets int64 [n], whose int64 [n] the row's
    sequence that each belongs to."""

    positions: Tensor
    targets: Tensor
    whose: Tensor


def taught(packed: Packed, answers: Sequence[int]) -> Taught:
    """answers: tokens at the end of each sequence that are the answer, fewer than it has of its own."""
    positions, whose, end = [], [], packed.shared
    for number, (length, answer) in enumerate(zip(packed.lengths, answers, strict=True)):
        end += length
        positions.append(torch.arange(end - answer - 1, end - 1))
        whose.append(torch.full((answer,), number))
    found = torch.cat(positions)
    return Taught(found, packed.tokens[found + 1], torch.cat(whose))


class Rows:
    """Fixed sequences that end in answers, and their way through a model with adapters from `first` up."""

    def __init__(
        self, model: Decoder, first: int, states: FrozenStates, lengths: Sequence[int], answers: Sequence[int]
    ) -> None:
        self.model, self.lengths = model, lengths
        self._first, self._states, self._answers = first, states, answers

    @property
    def known(self) -> int:
        """How many sequences have kept states by now."""
        return self._states.known

    def run(self, numbers: Sequence[int]) -> tuple[Tensor, Taught]:
        """Last hidden state [tokens, width] of some of them, and where their answers are."""
        packed, states = self._states.batch(numbers)
        hidden = self.model.run(states, packed, start=self._first)
        return hidden, taught(packed, [self._answers[number] for number in numbers])

    def parts(self, numbers: Sequence[int], tokens: int) -> list[list[int]]:
        """Cut into parts of at most so many tokens (a longer sequence is one of its own), by length."""
        parts: list[list[int]] = []
        size = 0
        for number in sorted(numbers, key=lambda number: (self.lengths[number], number)):
            if not parts or size + self.lengths[number] > tokens:
                parts.append([])
                size = 0
            parts[-1].append(number)
            size += self.lengths[number]
        return parts

    def answer_tokens(self, numbers: Sequence[int]) -> int:
        """How many tokens their answers have together."""
        return sum(self._answers[number] for number in numbers)


def supervised(rows: Rows, numbers: Sequence[int], total: int) -> Tensor:
    """Mean cross entropy of answer tokens in nats, of which this part is a share; total: of all parts."""
    hidden, where = rows.run(numbers)
    return cross_entropy(rows.model, hidden, where.positions, where.targets) / total


def preference(rows: Rows, pairs: Sequence[int], total: int, beta: float, reference: Tensor) -> Tensor:
    """DPO (Rafailov et al., 2023, arXiv:2305.18290): mean of -log sigmoid(beta margin) over `total` pairs.

    Pair k is sequences 2k (preferred) and 2k + 1. The margin is how much more the adapter has raised the
    log-probability of the first than of the second; reference: those of all sequences without it, float32
    [sequences]. The loss's value and gradient are exact: a pass over the logits gives the margins, and with
    them the weight that each token has in the gradient.
    """
    numbers = [number for pair in pairs for number in (2 * pair, 2 * pair + 1)]
    hidden, where = rows.run(numbers)
    gained = log_probabilities(rows.model, hidden.detach(), where, len(numbers)) - reference[numbers]
    margins = beta * (gained[0::2] - gained[1::2])  # [pairs]
    weight = beta * torch.sigmoid(-margins) / total  # of the preferred one's tokens; the other's: minus it
    signed = torch.stack([weight, -weight], dim=1).flatten()
    slope = cross_entropy(rows.model, hidden, where.positions, where.targets, signed[where.whose])
    value = -functional.logsigmoid(margins).sum() / total
    return slope - slope.detach() + value


def log_probabilities(model: Decoder, hidden: Tensor, where: Taught, sequences: int) -> Tensor:
    """Of each sequence's answer, in nats: float32 [sequences]. No gradient."""
    losses, _ = token_losses(model, hidden, where)
    return torch.zeros(sequences).index_add_(0, where.whose, -losses)


def token_losses(model: Decoder, hidden: Tensor, where: Taught) -> tuple[Tensor, Tensor]:
    """-log p of each answer token in nats, float32 [n], and whether it was the likeliest, bool [n]."""
    losses, hits = [], []
    step = max(1, LOGIT_BYTES // (4 * model.vocabulary))
    with torch.no_grad():
        for positions, targets in zip(
            torch.split(where.positions, step), torch.split(where.targets, step), strict=True
        ):
            logits = model.logits(hidden, positions)
            losses.append(functional.cross_entropy(logits, targets, reduction="none"))
            hits.append(logits.argmax(-1) == targets)
    return torch.cat(losses), torch.cat(hits)


@dataclass(frozen=True, slots=True)
class Score:
    """loss: nats an answer token. exact: share of answers that greedy decoding gives word for word."""

    loss: float
    exact: float


def measure(
    rows: Rows, numbers: Sequence[int], tokens: int, breathe: Callable[[], None] = lambda: None
) -> Score:
    """How well the answers of some sequences are known; tokens: at once; breathe: called between parts."""
    losses, right, count = 0.0, 0, 0
    for part in rows.parts(numbers, tokens):
        breathe()
        with torch.no_grad():
            hidden, where = rows.run(part)
        found, hits = token_losses(rows.model, hidden, where)
        missed = torch.zeros(len(part)).index_add_(0, where.whose, (~hits).float())
        losses, count = losses + float(found.sum()), count + len(found)
        right += int((missed == 0).sum())
    return Score(losses / count, right / len(numbers))


def reference_log_probabilities(rows: Rows, tokens: int) -> Tensor:
    """Of all answers by the model without its adapters: float32 [sequences]."""
    out = torch.zeros(len(rows.lengths))
    with torch.no_grad(), without_adapters(rows.model):
        for part in rows.parts(range(len(rows.lengths)), tokens):
            hidden, where = rows.run(part)
            out[part] = log_probabilities(rows.model, hidden, where, len(part))
    return out


def common_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with, their last token not among them; 0 where that saves nothing."""
    if len(examples) < 2:
        return 0
    first = min((example.prompt for example in examples), key=len)
    length = len(first) - 1
    for example in examples:
        while example.prompt[:length] != first[:length]:
            length -= 1
    return length
