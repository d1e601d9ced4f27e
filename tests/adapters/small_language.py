"""Answers in a made-up language, for draft heads. Imports no torch: that makes llama.cpp's threads spin."""

from __future__ import annotations

import numpy as np

from lichen.adapters.states import TOP, Run
from tests.models.tiny_models import WIDTH

FIRST, COUNT = 260, 40  # the tokens of the made-up language


def language(seed: int, count: int, *, turn: int = 7, length: int = 40) -> list[Run]:
    """Answers in a language where each token says the next one; a state is a fixed picture of its token."""
    chance = np.random.default_rng(seed)
    pictures = np.random.default_rng(5).normal(0, 1, (COUNT, WIDTH))
    runs = []
    for _ in range(count):
        own = [int(chance.integers(COUNT))]
        while len(own) < length + 1:
            own.append((own[-1] * 3 + turn) % COUNT)
        top = np.zeros((length, TOP), np.int32)
        top[:, 0] = np.array(own[1:]) + FIRST
        chances = np.full((length, TOP), -20, np.float16)
        chances[:, 0] = 0
        noise = chance.normal(0, 0.1, (length, WIDTH))
        tokens = np.array(own, np.int32) + FIRST
        runs.append(Run(tokens, (pictures[own[:-1]] + noise).astype(np.float16), top, chances))
    return runs
