"""A plain `llama_decode` loop, one sequence at a time: what the engine's greedy answers must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lichen.runtime.native import DECODE_OK, Context, ContextSize, Model

CHUNK = 256  # tokens a decode takes at most, as the engine's step


@dataclass
class Step:
    """One greedy choice: the token, and by how much its logit leads the second best."""

    token: int
    lead: float


@contextmanager
def plain_loop(
    path: Path, *, context: int = 2048
) -> Iterator[tuple[Model, Callable[[list[int], int], list[Step]]]]:
    """The model, and a function that continues a prompt greedily."""
    model = Model(path)
    native = Context(model, ContextSize(context=context, slots=1, threads=2, batch=CHUNK))

    def run(prompt: list[int], limit: int) -> list[Step]:
        native.clear(0)
        steps: list[Step] = []
        tokens = list(prompt)
        done = 0
        while len(steps) < limit:
            part = tokens[done : done + CHUNK]
            outputs = [0] * len(part)
            outputs[-1] = 1
            code = native.decode(part, list(range(done, done + len(part))), [0] * len(part), outputs)
            assert code == DECODE_OK
            done += len(part)
            if done < len(tokens):
                continue
            logits = native.logits(len(part) - 1)
            first = int(logits.argmax())
            second, best = np.partition(logits, -2)[-2:]
            steps.append(Step(first, float(best - second)))
            tokens.append(first)
            if model.is_end(first):
                break
        return steps

    yield model, run
    native.close()
    model.close()
