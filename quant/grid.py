"""Rows that ggml could not quantize to a type of the IQ1, IQ2 and IQ3 families without ending the process.

These types are found by a search over a grid of points. Its sums are products of a weight's square and its
importance; where they overflow float32 or vanish, no point is found ("found point not on grid"), and
ggml aborts. What is refused here is out of reach of any trained model, but for columns without importance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lichen.quant.formats import GGMLType

GRID_TYPES = frozenset(kind for kind in GGMLType if kind.name.startswith(("IQ1", "IQ2", "IQ3")))
_GRID_GROUP = 8  # weights that share a point
_GRID_RANGE = (1e-19, 1e15)  # least and greatest square times importance that leave room for the sums
_GRID_ZERO = 1e-15  # ggml takes a group whose weights are all smaller for zeros (GROUP_MAX_EPS)


def first_off_grid(part: npt.NDArray[np.float32], weights: npt.NDArray[np.float32] | None) -> int | None:
    """Index of the first row in which the search over a grid could fail. part: [rows, columns]."""
    groups = np.abs(part, dtype=np.float64).reshape(len(part), -1, _GRID_GROUP)
    peaks = groups.max(axis=2)  # [rows, groups]
    if weights is None:  # ggml then takes the square of a weight for its importance, and no root of it
        energy, most = peaks**3, peaks.max(axis=1) ** 3
    else:
        given = weights.astype(np.float64)
        energy = (groups**2 * given.reshape(-1, _GRID_GROUP)).max(axis=2)
        most = peaks.max(axis=1) ** 2 * given.max()
    low, high = _GRID_RANGE
    bad = (most > high) | ((energy < low) & (peaks >= _GRID_ZERO)).any(axis=1)
    return int(bad.argmax()) if bad.any() else None
