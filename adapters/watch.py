"""The time after an adapter was put in its place: whether living with it is worse, so that it must go.

Ratings, the loss on live traffic and the acceptance of drafts are compared with the time before, and a turn
for the worse counts once chance does not explain it. A pure function of counts; whoever serves gathers them.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

SURE = 2.326  # standard errors: one-sided, 99 %
FEWEST = 30  # answers: the mean of fewer is not normal enough to say how sure it is
FEWEST_RATED = 5  # ratings: fewer may be one person's mood


class Lived(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted over some time with one adapter, or none.

    up, down: ratings. answers: that were scored; loss, squares: sums over them of an answer's mean -log p a
    token, in nats, and of its square (tokens of one answer hang together, answers do not). drafted, accepted:
    tokens of speculation.
    """

    up: int = 0
    down: int = 0
    answers: int = 0
    loss: float = 0.0
    squares: float = 0.0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Lived) -> Lived:
        return Lived(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What is a bad turn, as shares: more ratings down, a higher loss, fewer drafted tokens accepted."""

    down: float = 0.05
    loss: float = 0.1
    accepted: float = 0.1


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """stay until more is known, or go back to what was served before, and why."""

    decision: Literal["stay", "back"]
    reasons: list[str] = []


def watch(before: Lived, now: Lived, bounds: Bounds) -> Turn:
    """Compare two times. Measures that one of them lacks say nothing."""
    reasons = []
    down = None
    if min(before.up + before.down, now.up + now.down) >= FEWEST_RATED:
        down = _points(before.down, before.up + before.down, now.down, now.up + now.down)
    if down is not None and down > bounds.down:
        reasons.append(f"Answers are rated down more often, by at least {down:.0%}.")
    rise = _rise(before, now)
    if rise is not None and rise > bounds.loss:
        reasons.append(f"The loss on what is answered rises by at least {rise:.0%}.")
    missed = _points(
        before.drafted - before.accepted, before.drafted, now.drafted - now.accepted, now.drafted
    )
    if missed is not None and missed > bounds.accepted:
        reasons.append(f"Fewer drafted tokens are right, by at least {missed:.0%}.")
    return Turn(decision="back" if reasons else "stay", reasons=reasons)


def _points(first: int, of: int, second: int, of_second: int) -> float | None:
    """By how much a share is larger now, at the least.

    The lower bound of Newcombe's interval (1998, method 10), which joins two of Wilson's and so is right for
    a handful of ratings too.
    """
    if not of or not of_second:
        return None
    (old, _, highest), (new, lowest, _) = _wilson(first, of), _wilson(second, of_second)
    return new - old - math.sqrt((new - lowest) ** 2 + (highest - old) ** 2)


def _wilson(count: int, of: int) -> tuple[float, float, float]:
    """A share with its Wilson score interval (1927)."""
    share, square = count / of, SURE * SURE / of
    middle = (share + square / 2) / (1 + square)
    half = SURE / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return share, middle - half, middle + half


def _rise(before: Lived, now: Lived) -> float | None:
    """By how much the mean loss is higher now, at the least, as a share of the mean before."""
    if min(before.answers, now.answers) < FEWEST or before.loss <= 0:
        return None
    old, new = before.loss / before.answers, now.loss / now.answers
    error = math.sqrt(_variance(before) / before.answers + _variance(now) / now.answers)
    return (new - old - SURE * error) / old


def _variance(lived: Lived) -> float:
    return max(0.0, lived.squares / lived.answers - (lived.loss / lived.answers) ** 2)
