"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864), in the variants that GGUF files need.

This is the one place that knows how the rows of a file's query and key matrices are ordered. A GGUF of
the Llama family stores them for pairs of neighbours (INTERLEAVED), other families for pairs that are
half a head apart (HALVES). lichen keeps the file's order and turns the pairs that belong to it, so no
weight, and no adapter trained here, is ever permuted.

Scaling for longer contexts: linear, YaRN (Peng et al., 2023, arXiv:2309.00071), and a factor a frequency
from the tensor rope_freqs (Llama 3). LongRoPE is refused: it has two sets of factors, by context length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lichen.models.metadata import Metadata


class Pairs(Enum):
    """Which two numbers of a head make one complex number."""

    INTERLEAVED = "interleaved"  # 2i and 2i + 1
    HALVES = "halves"  # i and i + dims / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """What YaRN adds to a factor: between the two numbers of rotations within the original context, the
    frequencies go over from kept ones to divided ones."""

    original_context: int  # tokens
    fast: float = 32.0
    slow: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """One set of frequencies.

    dims: the width of a head. factor: how much slower everything turns than `base` says. magnitude:
    multiplies what was turned.
    """

    pairs: Pairs
    dims: int
    base: float
    factor: float = 1.0
    magnitude: float = 1.0
    yarn: Yarn | None = None

    def frequencies(self) -> Tensor:
        """Radians a position: float64 [dims / 2]."""
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims
        plain = self.base**-exponents
        if self.yarn is None:
            return plain / self.factor
        first = max(0.0, math.floor(self._dimension(self.yarn.fast, self.yarn)))
        last = min(self.dims - 1.0, math.ceil(self._dimension(self.yarn.slow, self.yarn)))
        steps = torch.arange(self.dims // 2, dtype=torch.float64)
        divided = ((steps - first) / max(0.001, last - first)).clamp_(0, 1)
        return plain * (1 - divided) + plain / self.factor * divided

    def _dimension(self, rotations: float, yarn: Yarn) -> float:
        """The pair that turns so many times within the original context."""
        turns = yarn.original_context / (rotations * 2 * math.pi)
        return self.dims * math.log(turns) / (2 * math.log(self.base))

    def table(self, positions: Tensor, factors: Tensor | None) -> RopeTable:
        """Cosines and sines for positions, int64 [tokens]; factors: [dims / 2], dividing frequencies."""
        frequencies = self.frequencies()
        if factors is not None:
            frequencies = frequencies / factors.double()
        angles = positions.double().unsqueeze(-1) * frequencies.to(positions.device)  # [tokens, dims / 2]
        turns = torch.polar(torch.full_like(angles, self.magnitude), angles).to(torch.complex64)
        return RopeTable(self.pairs, turns.unsqueeze(-2))


@dataclass(frozen=True, slots=True)
class RopeTable:
    """The turn of each token: complex64 [tokens, 1, dims / 2]."""

    pairs: Pairs
    turns: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Turn x [tokens, heads, head_width] by the tokens' positions; same shape and dtype."""
        y: Tensor = _Turn.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Turn(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the table is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: RopeTable) -> Tensor:
        ctx.table = table
        return _turned(x, table, table.turns)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return _turned(gradients[0], ctx.table, ctx.table.turns.conj_physical()), None


def _turned(x: Tensor, table: RopeTable, turns: Tensor) -> Tensor:
    numbers = x.float().contiguous()
    out = torch.empty_like(numbers)
    if table.pairs is Pairs.INTERLEAVED:
        pairs = torch.view_as_complex(numbers.view(*x.shape[:-1], -1, 2))
        torch.mul(pairs, turns, out=torch.view_as_complex(out.view(*x.shape[:-1], -1, 2)))
    else:
        half = x.shape[-1] // 2
        real, imaginary = numbers[..., :half], numbers[..., half:]
        torch.mul(real, turns.real, out=out[..., :half]).addcmul_(imaginary, turns.imag, value=-1)
        torch.mul(imaginary, turns.real, out=out[..., half:]).addcmul_(real, turns.imag)
    return out.to(x.dtype)


def read_rope(metadata: Metadata, head_width: int, pairs: Pairs) -> Rope:
    """The rope of a file's metadata. Raises ModelFileError for a scaling that is not understood."""
    dims = metadata.integer("rope.dimension_count", head_width)
    if dims != head_width or dims % 2:
        raise metadata.fault(
            f"{dims} of {head_width} numbers of a head turn, but in this family all of them must"
        )
    # the older of llama.cpp's two keys for a linear factor; a factor of 0 means none, as there
    old = metadata.number("rope.scale_linear", 1.0, zero=True)
    factor = metadata.number("rope.scaling.factor", old, zero=True) or 1.0
    kind = metadata.text("rope.scaling.type", "linear")
    magnitude = metadata.number("rope.scaling.attn_factor", 1.0)
    context = metadata.integer(
        "rope.scaling.original_context_length", metadata.integer("context_length", 1 << 12), limit=1 << 31
    )
    rope = Rope(
        pairs=pairs,
        dims=dims,
        base=metadata.number("rope.freq_base", 10000.0),
        factor=1.0 if kind == "none" else factor,
        magnitude=magnitude,
    )
    if kind in ("none", "linear") or (kind == "yarn" and factor == 1):
        return rope
    if kind == "yarn":
        # the paper's temperature of the attention, shared out to queries and keys
        warmer = magnitude * (1 + 0.1 * math.log(factor))
        return replace(rope, yarn=_read_yarn(metadata, context), magnitude=warmer)
    raise metadata.fault(
        f"its rope scaling {kind!r} is not one of none, linear and yarn, "
        "and without it longer texts would be misread"
    )


def _read_yarn(metadata: Metadata, context: int) -> Yarn:
    for key, usual in (("log_multiplier", (0.0,)), ("ext_factor", (1.0, -1.0)), ("attn_factor", (1.0,))):
        metadata.refuse(f"rope.scaling.yarn_{key}", "lichen has the paper's YaRN only", unless=usual)
    return Yarn(
        original_context=context,
        fast=metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        slow=metadata.number("rope.scaling.yarn_beta_slow", 1.0),
    )
