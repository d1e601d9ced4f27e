"""Perplexity of a model on a text, and how far its predictions are from another's.

All sums are over positions, in nats, in float64; logits come in parts, since those of a whole text would not
fit into memory. KL is that of a reference's distribution to the model's: what the reference knew and the
model lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float32]

PART = 64  # positions at a time


@dataclass(slots=True)
class Tally:
    """Sums over the positions of a text. losses: -log p of each token, kls: of each position."""

    losses: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    same_top: int = 0

    def add(self, logits: Logits, targets: Sequence[int], reference: Logits | None = None) -> None:
        """logits, reference: [positions, vocabulary], after which the targets [positions] come."""
        for first in range(0, len(targets), PART):
            part = slice(first, first + PART)
            own = _log_softmax(logits[part])
            wanted = np.asarray(targets[part])
            self.losses += (-own[np.arange(len(wanted)), wanted]).tolist()
            if reference is not None:
                theirs = _log_softmax(reference[part])
                kl = (np.exp(theirs) * (theirs - own)).sum(axis=1, dtype=np.float64)
                self.kls += kl.tolist()
                self.same_top += int((own.argmax(axis=1) == theirs.argmax(axis=1)).sum())

    def result(self) -> dict[str, Any]:
        """What people and programs want to know of it; `error` is the standard error of a mean."""
        mean, error = mean_and_error(self.losses)
        found: dict[str, Any] = {
            "positions": len(self.losses),
            "perplexity": math.exp(mean),
            "perplexity_error": math.exp(mean) * error,
        }
        if self.kls:
            kl, kl_error = mean_and_error(self.kls)
            found |= {"kl": kl, "kl_error": kl_error, "same_top": self.same_top / len(self.kls)}
        return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, as if positions did not depend on each other (they do, a little)."""
    numbers = np.asarray(values, np.float64)
    spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return float(numbers.mean()), spread / math.sqrt(len(numbers))


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=1, keepdims=True)
    lengths: Logits = np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    result: Logits = shifted - lengths
    return result
