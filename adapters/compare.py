"""Two versions of an adapter side by side: lineage, scores, and how far each layer has moved.

What an adapter adds to a layer is s B A with B [outputs, rank] and A [rank, inputs]. Norms and distances are
taken without forming that product: <B1 A1, B2 A2> = sum((B1' B2) * (A1 A2')).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lichen.adapters.versions import Difference, LayerChange, Version
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor, open_gguf

Matrix = npt.NDArray[np.float32]


class Factors(NamedTuple):
    """One layer's adapter. a: float32 [rank, inputs]; b: float32 [outputs, rank]; scale: of their product."""

    a: Matrix
    b: Matrix
    scale: float

    def inner(self, other: Factors) -> float:
        """The inner product of what two adapters add to the same layer."""
        left = self.b.T.astype(np.float64) @ other.b
        right = self.a.astype(np.float64) @ other.a.T
        return float(self.scale * other.scale * (left * right).sum())


def read_factors(path: Path) -> dict[str, Factors]:
    """Every layer's adapter of a checked file, by the name of the model's tensor."""
    with open_gguf(path, model=False) as file:
        alpha = float(file.metadata["adapter.lora.alpha"].content)
        parts = {name: numbers(tensor) for name, tensor in file.tensors.items()}
    factors: dict[str, Factors] = {}
    for name in (name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")):
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        factors[name] = Factors(a, b, alpha / a.shape[0])
    return factors


def numbers(tensor: GGUFTensor) -> Matrix:
    """A tensor of an adapter as float32, copied out of the file."""
    if tensor.type is GGMLType.BF16:
        return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    kind = np.float16 if tensor.type is GGMLType.F16 else np.float32
    return tensor.data.view(kind).astype(np.float32).reshape(tensor.shape)


def compare(a: Version, a_file: Path, b: Version, b_file: Path) -> Difference:
    """What two versions have not in common."""
    first, second = read_factors(a_file), read_factors(b_file)
    before, after = set(a.lineage.lessons), set(b.lineage.lessons)
    return Difference(
        a=a.digest,
        b=b.digest,
        lessons_added=tuple(sorted(after - before)),
        lessons_removed=tuple(sorted(before - after)),
        options=_changed(a.lineage.options, b.lineage.options),
        scores=_changed(a.lineage.scores, b.lineage.scores),
        layers=tuple(
            _layer(name, first.get(name), second.get(name)) for name in sorted({*first, *second}, key=_order)
        ),
    )


def _layer(name: str, a: Factors | None, b: Factors | None) -> LayerChange:
    a_square = 0.0 if a is None else a.inner(a)
    b_square = 0.0 if b is None else b.inner(b)
    shared = 0.0 if a is None or b is None else a.inner(b)
    return LayerChange(
        layer=name,
        a=None if a is None else a_square**0.5,
        b=None if b is None else b_square**0.5,
        distance=max(0.0, a_square + b_square - 2 * shared) ** 0.5,
    )


def _order(name: str) -> tuple[int, str]:
    block = name.split(".")[1] if name.startswith("blk.") else ""
    return (int(block) if block.isdecimal() else -1, name)


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Pairs of values that differ, by dotted names."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*a, *b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            changed |= _changed(left, right, f"{prefix}{key}.")
        elif left != right:
            changed[f"{prefix}{key}"] = (left, right)
    return changed
