"""What a model answers by itself, and what it thought possible at each token: made before it learns anything.

Answers are drawn from the model's own distribution (temperature 1, no cut), so that the loss on them rises by
the divergence from the model as it was, in the mean. No outside data is needed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lichen.adapters.lora import without_adapters
from lichen.adapters.task import Example
from lichen.models.attention import KVCache
from lichen.models.decoder import Decoder
from lichen.models.packing import pack

TOP = 32  # continuations that are kept of each token; the others count together
COMPANY = 64  # prompts that are answered at once: a step of a few costs as much as one of many


@dataclass(frozen=True, slots=True)
class Recalled:
    """A prompt with the model's own answer. likely: int32 [answer, TOP], the likeliest tokens at each of the
    answer's; logs: float32 [answer, TOP], their log-probabilities in nats. loss: -log p of the answer."""

    example: Example
    likely: Tensor
    logs: Tensor
    loss: float


def recall(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    ends: frozenset[int],
    length: int,
    seed: int,
    going_on: Callable[[], bool] = lambda: True,
) -> list[Recalled]:
    """Answers of at most `length` tokens to each prompt, without the model's adapters.

    ends: tokens that end an answer. going_on: asked before each step; once it is False, what was answered so
    far is returned. The same seed gives the same answers for the same prompts and threads.
    """
    source = torch.Generator().manual_seed(seed)
    found: list[Recalled] = []
    with torch.no_grad(), without_adapters(model):
        for first in range(0, len(prompts), COMPANY):
            group = [list(prompt) for prompt in prompts[first : first + COMPANY]]
            found += _answered(model, group, ends, length, source, going_on)
    return found


def _answered(
    model: Decoder,
    prompts: list[list[int]],
    ends: frozenset[int],
    length: int,
    source: torch.Generator,
    going_on: Callable[[], bool],
) -> list[Recalled]:
    cache = KVCache(len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompts]
    losses = [0.0] * len(prompts)
    new = prompts
    for _ in range(length):
        if not going_on():
            break
        packed = pack(new)
        hidden = model.run(model.embed(packed), packed, cache=cache)
        last = torch.tensor(packed.lengths).cumsum(0) - 1
        logs = model.logits(hidden, last).log_softmax(-1)  # [prompts, vocabulary]
        chosen = torch.multinomial(logs.exp(), 1, generator=source).squeeze(-1).tolist()
        best = logs.topk(min(TOP, model.vocabulary), dim=-1)
        for number, answer in enumerate(answers):
            if not answer or answer[-1] not in ends:
                answer.append(chosen[number])
                losses[number] -= float(logs[number, chosen[number]])
                kept[number].append((best.indices[number].int(), best.values[number]))
        if all(answer[-1] in ends for answer in answers):
            break
        new = [[answer[-1]] for answer in answers]  # those that ended go along, and nobody listens
    return [
        Recalled(
            Example(prompt, answer),
            torch.stack([likely for likely, _ in rows]),
            torch.stack([values for _, values in rows]),
            loss,
        )
        for prompt, answer, rows, loss in zip(prompts, answers, kept, losses, strict=True)
        if answer
    ]
