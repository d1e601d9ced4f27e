"""Gives each tensor one of several types so that the sum of costs is least within a number of bytes.

This is the multiple-choice knapsack problem (Sinha and Zoltners, 1979): the greedy walk along the lower
convex hulls of all tensors, steepest step first, solves its linear relaxation, so that it is off by less than
one step; what is left of the budget is then spent on the best single exchanges.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lichen.errors import ConfigError
from lichen.quant.formats import GGMLType


@dataclass(frozen=True, slots=True)
class Option:
    """A type for a tensor: its bytes, and what it costs in quality (any unit that may be summed)."""

    type: GGMLType
    bytes: int
    cost: float


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option a tensor, together at most `budget` bytes, with nearly the least sum of costs.

    Raises ConfigError that says the smallest possible number when the budget is too small.
    """
    hulls = {name: convex_hull(choices) for name, choices in options.items()}
    least = sum(min(option.bytes for option in choices) for choices in options.values())
    if budget < least:
        raise ConfigError(
            f"{budget:,} bytes are too few for the tensors: the smallest possible are {least:,}.",
            hint="Raise the budget, or allow smaller types.",
        )
    place = dict.fromkeys(hulls, 0)
    room = budget - sum(hull[0].bytes for hull in hulls.values())
    steps = [_step(name, hull, 0) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, at = heapq.heappop(steps)
        hull = hulls[name]
        size = hull[at + 1].bytes - hull[at].bytes
        if size > room:
            continue  # later steps of this tensor need this one first; other tensors may still fit
        room -= size
        place[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, _step(name, hull, at + 1))
    chosen = {name: hull[place[name]] for name, hull in hulls.items()}
    _spend(options, chosen, room)
    return chosen


def convex_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of a byte, by bytes; each costs less than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """Cost saved a byte."""
    return (a.cost - b.cost) / max(1, b.bytes - a.bytes)


def _step(name: str, hull: Sequence[Option], at: int) -> tuple[float, str, int]:
    return -_slope(hull[at], hull[at + 1]), name, at


def _spend(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], room: int) -> None:
    """Exchange single options while that saves cost and fits."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, choices in options.items():
            now = chosen[name]
            for option in choices:
                gain = now.cost - option.cost
                if gain > 0 and option.bytes - now.bytes <= room and (best is None or gain > best[0]):
                    best = (gain, name, option)
        if best is None:
            return
        _, name, option = best
        room -= option.bytes - chosen[name].bytes
        chosen[name] = option
