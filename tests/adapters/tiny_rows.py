"""A tiny random model with an adapter, and rows of made-up lessons on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from lichen.adapters.frozen import FrozenStates
from lichen.adapters.lora import adapted
from lichen.adapters.objectives import Rows, common_beginning
from lichen.adapters.task import Example
from lichen.models.decoder import Decoder
from tests.models.tiny_models import VOCABULARY


def copying(count: int, seed: int = 0, front: Sequence[int] = ()) -> list[Example]:
    """The answer repeats the question's last two tokens, and ends. front: what all questions begin with."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = [*front, *(source.randrange(259, VOCABULARY) for _ in range(source.randrange(3, 9)))]
        found.append(Example(prompt, [*prompt[-2:], 2]))
    return found


def rows_of(model: Decoder, first: int, examples: Sequence[Example], folder: Path, *, shared: int) -> Rows:
    """Rows over frozen states. shared: tokens of the common beginning that are computed once."""
    assert shared <= common_beginning(examples)
    sequences = [[*example.prompt, *example.answer] for example in examples]
    states = FrozenStates(model, first, sequences, limit=1 << 20, folder=folder, shared=shared)
    lengths = [len(sequence) - shared for sequence in sequences]
    return Rows(model, first, states, lengths, [len(example.answer) for example in examples])


def stir(model: Decoder, size: float = 0.05, seed: int = 2) -> None:
    """Make B random, so that the adapters change much."""
    source = torch.Generator().manual_seed(seed)
    for _, layer in adapted(model):
        layer.b.data.normal_(0, size, generator=source)
