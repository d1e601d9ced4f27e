"""Covering arrays: few combinations in which every pair (or triple) of values of different axes occurs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

Combination = dict[str, str]
Part = frozenset[tuple[str, str]]  # (axis, value) of `strength` different axes


def covering(axes: Mapping[str, Sequence[str]], *, strength: int = 2) -> list[Combination]:
    """Combinations, one value an axis, that contain every choice of values of any `strength` axes.

    Greedy, and the same list for the same axes. Raises ValueError for fewer axes than `strength` or an
    axis without values.
    """
    if len(axes) < strength or not all(axes.values()):
        raise ValueError(f"{strength} axes with values are needed")
    missing = dict.fromkeys(parts(axes, strength))
    rows = []
    while missing:
        row = dict(sorted(next(iter(missing))))
        for axis in sorted(axes, key=lambda name: (-len(axes[name]), name)):
            if axis not in row:
                row[axis] = max(axes[axis], key=lambda value: _gain(row, axis, value, strength, missing))
        for part in _parts_of(row, strength):
            missing.pop(part, None)
        rows.append({axis: row[axis] for axis in axes})
    return rows


def parts(axes: Mapping[str, Sequence[str]], strength: int) -> Iterator[Part]:
    """Everything that must occur."""
    for names in combinations(axes, strength):
        for values in product(*(axes[name] for name in names)):
            yield frozenset(zip(names, values, strict=True))


def _parts_of(row: Combination, strength: int) -> Iterator[Part]:
    return map(frozenset, combinations(row.items(), strength))


def _gain(row: Combination, axis: str, value: str, strength: int, missing: Mapping[Part, None]) -> int:
    """How much that is missing this value adds to a row that is half made (ties go to the earlier value)."""
    new = (axis, value)
    return sum(frozenset((new, *others)) in missing for others in combinations(row.items(), strength - 1))
