"""The training loop of a draft head: its network in torch, the states to learn from, one step at a time.

The loss is the cross-entropy to the model's own likeliest tokens (TOP of them, as far as they are words of
the head; up to a constant the KL divergence) and to the token that was drawn, half each, over several
positions ahead. Later positions count less, since they matter only where those before were right.
Words, and the first numbers of the two tables, come from the model: the most used tokens, and its own
embeddings on their principal axes, so that a head starts with what the model knows of its words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lichen.adapters.course import rate_at
from lichen.adapters.distil_task import DistilTask
from lichen.adapters.draft_head import EPSILON, DraftHead, Floats, HeadFacts, HeadWeights, Whole
from lichen.adapters.states import Run
from lichen.errors import TrainingError
from lichen.quant.ggml import dequantize
from lichen.quant.gguf import GGUFTensor, open_gguf

NORM = 1.0  # longest gradient
BETAS = (0.9, 0.99)
DECAY = 0.01
TABLE_RATE = 0.3  # of the rate: the tables know much already
NEARBY = 0.1  # of a use: what a token that would surely have come counts
FADING = 0.75  # weight of a position against the one before
RIDGE = 1e-3
MAX_F16 = 6e4


class HeadNetwork(nn.Module):
    """The network of `draft_head.py` with the same names."""

    def __init__(self, weights: HeadWeights) -> None:
        super().__init__()
        self.words = weights.words
        self.a_weight = _trained(weights.a_weight)
        self.a_bias = _trained(weights.a_bias)
        self.w_weight = _trained(weights.w_weight)
        self.w_bias = _trained(weights.w_bias)
        self.d_weight = _trained(weights.d_weight)
        self.table = _trained(weights.table)
        self.output = _trained(weights.output)
        self.output_bias = _trained(weights.output_bias)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, J, R] from states [n, H] and the rows [n, J] of the tokens that follow them."""
        z = F.linear(states, self.a_weight, self.a_bias)
        steps = []
        for position in range(rows.shape[1]):
            seen = F.embedding(rows[:, position], self.table)
            normal = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPSILON)
            inner = F.silu(F.linear(torch.cat([normal, seen], -1), self.w_weight, self.w_bias))
            z = z + F.linear(inner, self.d_weight)
            steps.append(z)
        return F.linear(torch.stack(steps, 1), self.output, self.output_bias)

    def weights(self) -> HeadWeights:
        """What is served, rounded as the file rounds it."""
        stored = {}
        for name, values in self.named_parameters():
            numbers = values.detach().numpy()
            if numbers.ndim > 1:
                numbers = numbers.clip(-MAX_F16, MAX_F16).astype(np.float16)
            stored[name] = numbers.astype(np.float32)
        return HeadWeights(words=self.words, **stored)


def _trained(values: Floats) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values.copy()))


class Lessons:
    """Runs as tensors. A lesson is a place i of a run: the state there, and the J + 1 tokens that follow."""

    def __init__(self, runs: Sequence[Run], head_rows: Whole, positions: int) -> None:
        self._positions = positions
        self._states = torch.from_numpy(np.concatenate([run.states for run in runs]))
        self._rows = torch.from_numpy(np.concatenate([head_rows[run.tokens] for run in runs]))
        self._top = torch.from_numpy(np.concatenate([head_rows[run.top] for run in runs]))
        self._chances = torch.from_numpy(np.concatenate([run.chances for run in runs]))
        left = np.concatenate([np.arange(len(run), 0, -1) for run in runs])  # states from a place on
        shift = np.concatenate([np.full(len(run), number) for number, run in enumerate(runs)])
        self._left, self._shift = torch.from_numpy(left), torch.from_numpy(shift)
        self._places = torch.from_numpy(np.flatnonzero(left > 1))

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of lessons [n]: states [n, H], rows read [n, J], rows to say [n, J], likeliest rows [n, J, TOP] and
        their probabilities, and which positions there are [n, J]."""
        places = self._places[chosen]
        ahead = torch.arange(1, self._positions + 1)
        there = ahead[None] < self._left[places][:, None]
        states = torch.where(there, places[:, None] + ahead[None], places[:, None])
        tokens = places + self._shift[places]  # a run has one token more than states
        read = torch.where(there, tokens[:, None] + ahead[None], tokens[:, None])
        said = torch.where(there, read + 1, read)
        return (
            self._states[places].float(),
            self._rows[read],
            self._rows[said],
            self._top[states],
            self._chances[states].float().exp(),
            there,
        )


def loss_of(network: HeadNetwork, batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Mean loss in nats a position, of those positions whose token is a word."""
    states, read, said, top, chances, there = batch
    words = len(network.words)
    logs = F.log_softmax(network(states, read), -1)
    known = (top < words) * chances  # [n, J, TOP]
    mass = known.sum(-1)
    soft = -(known * logs.gather(-1, top.clamp(max=words - 1))).sum(-1) / mass.clamp(min=1e-3)
    hard = -logs.gather(-1, said.clamp(max=words - 1)[..., None])[..., 0] * (said < words)
    weight = there * FADING ** torch.arange(there.shape[1])
    return ((0.5 * soft + 0.5 * hard) * weight).sum() / weight.sum().clamp(min=1.0)


class HeadTrainer:
    """One training of a head. Its state is all that decides what comes next."""

    def __init__(
        self, task: DistilTask, runs: Sequence[Run], start: DraftHead | None, vocabulary: int
    ) -> None:
        self.task = task
        torch.manual_seed(task.seed)
        self._before = start.facts if start is not None else HeadFacts(base=task.base, vocabulary=vocabulary)
        words = most_used(runs, vocabulary, len(start.words) if start is not None else task.words)
        weights = first_weights(task, words) if start is None else moved_weights(task, start, words)
        self.network = HeadNetwork(weights)
        rows = np.full(vocabulary, len(words), np.int64)
        rows[words] = np.arange(len(words))
        self.lessons = Lessons(runs, rows, task.positions)
        if not len(self.lessons):
            raise TrainingError("There are no answers to learn from yet.", hint="Ask for a few first.")
        tables = [self.network.table, self.network.output]
        rest = [value for name, value in self.network.named_parameters() if name not in ("table", "output")]
        self._optimizer = torch.optim.AdamW(
            [{"params": rest, "share": 1.0}, {"params": tables, "share": TABLE_RATE}],
            lr=task.rate,
            betas=BETAS,
            weight_decay=DECAY,
            foreach=False,
        )
        self._order = torch.Generator().manual_seed(task.seed)
        self.step, self.steps = 0, task.steps
        self._tokens = sum(len(run) for run in runs)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(value.numel() for value in self.network.parameters())

    def fit_into(self, seconds: float) -> None:
        """Lower the number of steps to what fits; two are tried, and leave nothing behind."""
        chosen = torch.arange(self.task.batch) % len(self.lessons)
        for _ in range(2):  # the first warms everything up
            started = time.monotonic()
            loss_of(self.network, self.lessons.batch(chosen)).backward()  # type: ignore[no-untyped-call]
            took = time.monotonic() - started
            self._optimizer.zero_grad()
        self.steps = max(1, min(self.steps, int(seconds / took)))

    def advance(self) -> tuple[float, float, float]:
        """One step: loss in nats a position, rate, norm. Raises TrainingError when they are no numbers."""
        rate = rate_at(self.step, self.steps, self.task.rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        chosen = torch.randint(len(self.lessons), (self.task.batch,), generator=self._order)
        loss = loss_of(self.network, self.lessons.batch(chosen))
        torch.autograd.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), NORM, foreach=False))
        if not (abs(float(loss.detach())) < float("inf") and norm < float("inf")):
            raise TrainingError(f"The loss of step {self.step + 1} is no number.", hint="Lower the rate.")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return float(loss.detach()), rate, norm

    def head(self, acceptance: Sequence[float] = ()) -> DraftHead:
        """The head as it would be served now."""
        before = self._before
        facts = HeadFacts(
            base=before.base,
            vocabulary=before.vocabulary,
            tokens=before.tokens + self._tokens,
            steps=before.steps + self.step,
            acceptance=tuple(acceptance),
        )
        return DraftHead(facts, self.network.weights())

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, as tensors and plain values."""
        return {
            "step": self.step,
            "steps": self.steps,
            "order": self._order.get_state(),
            "network": {name: value.detach().clone() for name, value in self.network.named_parameters()},
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` of the same task was taken."""
        self.step, self.steps = state["step"], state["steps"]
        self._order.set_state(state["order"])
        for name, value in self.network.named_parameters():
            value.data.copy_(state["network"][name])
        self._optimizer.load_state_dict(state["optimizer"])


# ---- words and first numbers --------------------------------------------------------------------------


def most_used(runs: Sequence[Run], vocabulary: int, count: int) -> Whole:
    """The tokens that answers use most, [at most count]; those that were merely likely count a little."""
    used = np.zeros(vocabulary)
    for run in runs:
        used += np.bincount(run.tokens, minlength=vocabulary)
        likely = np.exp(run.chances.astype(np.float32)).ravel()
        used += NEARBY * np.bincount(run.top.ravel(), likely, minlength=vocabulary)
    return np.sort(np.argsort(-used, kind="stable")[: min(count, vocabulary)]).astype(np.int64)


def first_weights(task: DistilTask, words: Whole) -> HeadWeights:
    """A head that knows nothing but the model's embeddings: A reads a state on their principal axes."""
    heard, said = _embeddings(Path(task.model), words)
    width = min(task.width, said.shape[1], len(words))
    _, _, axes = np.linalg.svd(said, full_matrices=False)
    basis = axes[:width].astype(np.float32)  # [d, H]
    table = heard @ basis.T
    table = np.concatenate([table / table.std(), np.zeros((1, width), np.float32)])
    chance = np.random.default_rng(task.seed)
    scale = (2 * width) ** -0.5
    return HeadWeights(
        words=words,
        a_weight=basis,
        a_bias=np.zeros(width, np.float32),
        w_weight=chance.uniform(-scale, scale, (task.inner, 2 * width)).astype(np.float32),
        w_bias=np.zeros(task.inner, np.float32),
        d_weight=np.zeros((width, task.inner), np.float32),
        table=table.astype(np.float32),
        output=(said @ basis.T).astype(np.float32),
        output_bias=np.zeros(len(words), np.float32),
    )


def moved_weights(task: DistilTask, start: DraftHead, words: Whole) -> HeadWeights:
    """The head to go on from, with other words; new ones get rows from the model's embeddings, by the map
    that fits the old rows best."""
    old = start.weights
    rows = start.rows(words)
    new = rows == len(old.words)
    table, output = old.table[rows], old.output[np.minimum(rows, len(old.words) - 1)]
    bias = np.where(new, 0, old.output_bias[np.minimum(rows, len(old.words) - 1)]).astype(np.float32)
    if new.any():
        path = Path(task.model)
        heard, said = _embeddings(path, old.words)
        heard_new, said_new = _embeddings(path, words[new])
        table[new] = heard_new @ _fitted(heard, old.table[:-1])
        output[new] = said_new @ _fitted(said, old.output)
    return HeadWeights(
        words=words,
        a_weight=old.a_weight,
        a_bias=old.a_bias,
        w_weight=old.w_weight,
        w_bias=old.w_bias,
        d_weight=old.d_weight,
        table=np.concatenate([table, old.table[-1:]]).astype(np.float32),
        output=output.astype(np.float32),
        output_bias=bias,
    )


def _fitted(known: Floats, rows: Floats) -> Floats:
    """The map [H, d] that takes `known` [R, H] nearest to `rows` [R, d] (ridge regression)."""
    gram = known.T @ known
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=np.float32)
    return np.asarray(np.linalg.solve(gram, known.T @ rows), np.float32)


def _embeddings(path: Path, words: Whole) -> tuple[Floats, Floats]:
    """Rows [R, H] of the model's input and output embeddings."""
    with open_gguf(path) as file:
        heard = _rows(file.tensors["token_embd.weight"], words)
        output = file.tensors.get("output.weight")
        return heard, heard if output is None else _rows(output, words)


def _rows(tensor: GGUFTensor, words: Whole) -> Floats:
    out = np.empty((len(words), tensor.shape[1]), np.float32)
    dequantize(tensor.type, np.ascontiguousarray(tensor.data[words]), out)
    return out
