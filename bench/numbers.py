"""Percentiles, medians and ratios of measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated between neighbours.

    Raises ValueError for no values or a percent outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float], *, digits: int = 2) -> dict[str, float] | None:
    """Count, least, p50, p95, p99 and greatest of many samples; None for none."""
    if not values:
        return None
    summary = {f"p{percent}": round(percentile(values, percent), digits) for percent in (50, 95, 99)}
    return {"n": len(values), "min": round(min(values), digits), **summary, "max": round(max(values), digits)}


def median(values: Iterable[float | None]) -> float | None:
    """Median of what is there; None for nothing."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def paired_ratio(
    subject: Mapping[int, float | None], other: Mapping[int, float | None]
) -> dict[str, float] | None:
    """subject / other for each run that both have: the median ratio, its range, and how many runs.

    Runs alternate, so the two sides of one run saw the same state of the machine; a ratio of two medians
    would mix runs. None when no run has both.
    """
    ratios = []
    for run in sorted(subject.keys() & other.keys()):
        above, below = subject[run], other[run]
        if above is not None and below:
            ratios.append(above / below)
    if not ratios:
        return None
    return {
        "median": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "runs": len(ratios),
    }


def rounded(value: float | None, digits: int = 2) -> float | None:
    """`value` rounded; None stays None."""
    return None if value is None else round(value, digits)


def dig(record: Mapping[str, Any], *path: str) -> Any:
    """A value deep in nested dictionaries, or None where the path breaks off."""
    value: Any = record
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
