"""The order of examples and the learning rate of each step; a pure function of seed and counts."""

from __future__ import annotations

import math
from typing import Any

import torch

WARM_UP = 0.05  # share of the steps
FLOOR = 0.1  # share of the highest rate that the last steps still have


def rate_at(step: int, steps: int, highest: float) -> float:
    """The learning rate of step 0 to steps - 1: linear up, then half a cosine down to FLOOR of it.

    (Loshchilov and Hutter, 2017, arXiv:1608.03983, without restarts.)
    """
    rising = max(1, round(steps * WARM_UP))
    if step < rising:
        return highest * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return highest * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)


class Course:
    """Numbers of the examples of each step; every epoch has an order of its own."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self._count, self._batch = count, batch
        self._source = torch.Generator().manual_seed(seed)
        self.epoch, self._at = 0, 0
        self._draw()

    @property
    def steps_an_epoch(self) -> int:
        """The last one may have fewer examples."""
        return -(-self._count // self._batch)

    def next(self) -> list[int]:
        """The examples of the next step."""
        if self._at >= self._count:
            self.epoch, self._at = self.epoch + 1, 0
            self._draw()
        chosen = self._order[self._at : self._at + self._batch]
        self._at += self._batch
        return chosen

    def state(self) -> dict[str, Any]:
        """All that decides what comes next."""
        return {"epoch": self.epoch, "at": self._at, "source": self._before}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._source.set_state(state["source"])
        self.epoch, self._at = state["epoch"], state["at"]
        self._draw()

    def _draw(self) -> None:
        self._before = self._source.get_state()
        self._order: list[int] = torch.randperm(self._count, generator=self._source).tolist()
