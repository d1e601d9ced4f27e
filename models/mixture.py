"""Chooses a type for every matrix of a model under a budget of bytes, by measured sensitivity.

1. Each tensor is stored as one anchor type and the change of the model's predictions is measured
   (`sensitivity.py`); tensors of one kind in `span` layers that follow each other may share a measurement.
2. Other types are rated by their importance-weighted quantization error over the anchor's: near the model
   the KL is a quadratic form of the error, so it grows with its square.
3. `quant/allocate.py` minimizes the sum.
4. The whole choice is measured, and the share of each kind of layer in it corrects the ratings; a new
   choice is taken only if it measures better.
docs/decisions/0010-bit-allocation.md has the measurements behind this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from lichen.errors import ConfigError
from lichen.models.sensitivity import Measure
from lichen.quant import ggml
from lichen.quant.allocate import Option, allocate
from lichen.quant.choice import bits, fits, is_matrix, kept_type, stored_bytes
from lichen.quant.formats import BLOCKS, GGMLType
from lichen.quant.gguf import GGUFFile, GGUFTensor
from lichen.quant.importance import Importance
from lichen.quant.ledger import Ledger, digest
from lichen.quant.quantize import HEADER_ROOM, header_bytes, read_rows, requantized

KINDS = (
    GGMLType.IQ2_S, GGMLType.Q2_K, GGMLType.IQ3_XXS, GGMLType.IQ3_S, GGMLType.MXFP4, GGMLType.IQ4_XS,
    GGMLType.Q4_0, GGMLType.IQ4_NL, GGMLType.Q4_K, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_K,
    GGMLType.Q5_1, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16,
)  # fmt: skip
ANCHOR = GGMLType.Q4_0  # its blocks fit nearly every row, and its error is well above rounding
SAMPLE = 1 << 16  # weights of a tensor whose quantization error is looked at
ROUNDS = 2  # of correction
LONG_KEY = 400  # characters of a key of the ledger; longer ones are hashed
FACTORS = (0.25, 4.0)  # a share is never corrected by more

Tell: TypeAlias = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A choice: the types of all tensors, the KL that was predicted for it, and the one measured (nats)."""

    types: Mapping[str, GGMLType]
    predicted: float
    measured: float
    ratings: Mapping[str, Sequence[Option]]


class Mixer:
    """Rates the tensors of one file once, and then chooses for any budget.

    measure: of the file's model. importance: or None, and types that need one are left out. span: layers
    that share a measurement.
    """

    def __init__(
        self,
        file: GGUFFile,
        measure: Measure,
        importance: Importance | None,
        *,
        kinds: Sequence[GGMLType] = KINDS,
        span: int = 1,
        ledger: Ledger | None = None,
        tell: Tell = lambda _what, _done, _of: None,
    ) -> None:
        self._file, self._measure, self._importance = file, measure, importance
        self._span = span
        self._ledger, self._tell = ledger or Ledger(None, ""), tell
        usable = [kind for kind in kinds if importance is not None or kind not in ggml.NEEDS_IMPORTANCE]
        self._kinds = sorted(set(usable), key=bits)
        self._cache: dict[tuple[str, GGMLType], GGUFTensor] = {}

    def ratings(self) -> dict[str, list[Option]]:
        """The options of every matrix; cost: the KL that each is expected to add, in nats."""
        groups: dict[tuple[str, int], list[GGUFTensor]] = {}
        for tensor in self._file.tensors.values():
            if is_matrix(tensor):
                groups.setdefault((_part(tensor.name), _layer(tensor.name) // self._span), []).append(tensor)
        found: dict[str, list[Option]] = {}
        for count, group in enumerate(groups.values()):
            self._tell("measuring tensors", count, len(groups))
            found |= self._rated(group)
        self._tell("measuring tensors", len(groups), len(groups))
        return {name: found[name] for name in self._file.tensors if name in found}

    def choose(
        self, budget: int, ratings: Mapping[str, Sequence[Option]], *, rounds: int = ROUNDS
    ) -> Mixture:
        """The best choice for a file of so many bytes. Raises ConfigError when that is too few.

        rounds: of correction. The mixture's ratings are the corrected ones, good for other budgets too.
        """
        check_budget(self._file, self._kinds, budget)
        fixed = {
            name: kept_type(tensor) for name, tensor in self._file.tensors.items() if name not in ratings
        }
        spent = header_bytes(self._file) + HEADER_ROOM
        spent += sum(_padded(stored_bytes(self._file.tensors[name], kind)) for name, kind in fixed.items())
        best: tuple[float, float, dict[str, Option]] | None = None
        for turn in range(rounds + 1):
            self._tell("choosing types", turn, rounds + 1)
            chosen = allocate(ratings, budget - spent)
            whole = self._kl(chosen)
            predicted = sum(option.cost for option in chosen.values())
            if best is None or whole < best[0]:
                best = (whole, predicted, chosen)
            if turn < rounds:
                corrected = self._corrected(ratings, chosen, whole)
                if corrected is None:
                    break
                ratings = corrected
        assert best is not None
        self._tell("choosing types", rounds + 1, rounds + 1)
        self._cache.clear()
        types = fixed | {name: option.type for name, option in best[2].items()}
        order = {name: types[name] for name in self._file.tensors}
        return Mixture(types=order, predicted=best[1], measured=best[0], ratings=ratings)

    # ---- tensors that share a measurement ---------------------------------------------------------

    def _rated(self, group: Sequence[GGUFTensor]) -> dict[str, list[Option]]:
        anchors = {tensor.name: ANCHOR if fits(tensor, ANCHOR) else GGMLType.F16 for tensor in group}
        whole = sum(self._error(tensor, anchors[tensor.name]) for tensor in group)
        kl = self.measured(anchors)
        self._cache.clear()  # the next measurement is of other tensors
        scale = kl / whole if whole > 0 else 0.0
        return {
            tensor.name: [
                Option(kind, _padded(stored_bytes(tensor, kind)), scale * self._error(tensor, kind))
                for kind in _fitting(tensor, self._kinds)
            ]
            for tensor in group
        }

    def measured(self, types: Mapping[str, GGMLType]) -> float:
        """The KL of the model with these tensors as those types, from the ledger where it is there.

        Tensors that no layer multiplies with change nothing.
        """
        used = {name: kind for name, kind in types.items() if name in self._measure.measurable()}
        if not used:
            return 0.0
        words = " ".join(f"{name}:{kind.name}" for name, kind in used.items())
        key = f"kl {words if len(words) < LONG_KEY else digest(words)}"
        kl = self._ledger.get(key)
        if kl is None:
            kl = self._measure.divergence({name: self._stored(name, kind) for name, kind in used.items()})
            self._ledger.put(key, kl)
        return kl

    def _error(self, tensor: GGUFTensor, kind: GGMLType) -> float:
        """Sum over sampled rows of importance times squared error, of a tensor as that type."""
        key = f"error {tensor.name} {kind.name}"
        known = self._ledger.get(key)
        if known is None:
            known = quantization_error(tensor, kind, self._importance)
            self._ledger.put(key, known)
        return known

    # ---- the whole choice -------------------------------------------------------------------------

    def _stored(self, name: str, kind: GGMLType) -> GGUFTensor:
        key = (name, kind)
        if key not in self._cache:
            self._cache[key] = requantized(self._file.tensors[name], kind, self._importance)
        return self._cache[key]

    def _kl(self, chosen: Mapping[str, Option], without: Iterable[str] = ()) -> float:
        """The KL of a choice; the tensors of `without` stay as they are."""
        left_out = frozenset(without)
        return self.measured({name: option.type for name, option in chosen.items() if name not in left_out})

    def _corrected(
        self, ratings: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], whole: float
    ) -> dict[str, list[Option]] | None:
        """Ratings in which each kind of layer costs what it adds to this choice; None if all is as rated."""
        groups: dict[str, list[str]] = {}
        for name in chosen:
            groups.setdefault(_part(name), []).append(name)
        factors: dict[str, float] = {}
        for group, names in groups.items():
            rated = sum(chosen[name].cost for name in names)
            share = whole - self._kl(chosen, names)
            factors[group] = float(np.clip(share / rated, *FACTORS)) if rated > 0 else 1.0
        if max(factors.values()) < 1.05 * min(factors.values()):
            return None
        return {
            name: [replace(option, cost=option.cost * factors[_part(name)]) for option in options]
            for name, options in ratings.items()
        }


def check_budget(file: GGUFFile, kinds: Sequence[GGMLType], budget: int) -> None:
    """Raises ConfigError that says the smallest possible file when a budget, in bytes, is below it."""
    least = header_bytes(file) + HEADER_ROOM
    for tensor in file.tensors.values():
        choices = _fitting(tensor, kinds) if is_matrix(tensor) else [kept_type(tensor)]
        least += min(_padded(stored_bytes(tensor, kind)) for kind in choices)
    if budget < least:
        raise ConfigError(
            f"A budget of {budget:,} bytes is too small: the smallest possible with these types "
            f"is {least:,}.",
            hint="Raise it, or allow smaller types with --types.",
        )


def _fitting(tensor: GGUFTensor, kinds: Sequence[GGMLType]) -> list[GGMLType]:
    return [kind for kind in kinds if fits(tensor, kind)] or [GGMLType.F16]


def quantization_error(tensor: GGUFTensor, kind: GGMLType, importance: Importance | None) -> float:
    """Importance times squared error, summed over evenly spaced rows (`SAMPLE` weights of them).

    Without importance every column counts 1. The sum is scaled to the whole tensor.
    """
    count, columns = len(tensor.data), tensor.shape[-1]
    rows = np.linspace(0, count - 1, max(1, min(count, SAMPLE // columns))).astype(np.int64)
    numbers = read_rows(tensor, np.ascontiguousarray(tensor.data[rows]))
    weights = importance.of(tensor) if importance is not None else None
    stored = np.empty((len(rows), stored_bytes(tensor, kind) // count), np.uint8)
    ggml.quantize(kind, numbers, stored, weights if BLOCKS[kind][0] > 1 else None)
    again = np.empty_like(numbers)
    ggml.dequantize(kind, stored, again)
    squares = np.square(again - numbers, dtype=np.float64).sum(axis=0)  # [columns]
    total = squares.sum() if weights is None else squares @ weights
    return float(total) * count / len(rows)


def _padded(size: int) -> int:
    return -(-size // 32) * 32


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _part(name: str) -> str:
    """What a tensor is, whichever layer it is in."""
    return re.sub(r"^blk\.\d+\.", "", name)
