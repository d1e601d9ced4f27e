"""Makes an adapter smaller: ranks and layers that do not pay are taken out, measured by the loss.

Each layer's product B A is written as its singular value decomposition. A component's importance is the
change of the loss when it is left out, to second order: the sum over batches of (dL / dgate)^2, its gate
being 1. The least important for their bytes go first, as many as measured losses allow; so each matrix gets
a rank of its own, and 0 takes the layer out. Exact where nothing is taken out, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from lichen.adapters.lora import LoRALinear, adapted
from lichen.adapters.objectives import Rows, measure, supervised
from lichen.models.decoder import Decoder

PARTS = 64  # of all components: how fine the number to take out is sought, since each look takes seconds
ZERO = 1e-6  # a singular value below this share of the layer's greatest is rounding


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What was gained and lost. bytes: of the factors in float32. losses: nats a token, of each probe."""

    bytes_before: int
    bytes_after: int
    ranks: dict[str, int]
    losses_before: list[float]
    losses_after: list[float]


def prune(model: Decoder, probes: Sequence[Rows], *, allowed: float, tokens: int) -> Pruned:
    """Take out as much as raises the loss on no probe by more than a share `allowed`.

    The adapters afterwards hold the result as settled, and train nothing. tokens: at once through the model.
    """
    layers = dict(adapted(model))
    before = sum(_bytes(*layer.factors()) for layer in layers.values())
    whole = {name: components(*layer.factors()) for name, layer in layers.items()}
    _install(layers, whole)
    losses = [_loss(rows, tokens) for rows in probes]
    order = _order(_importance(layers, whole, probes, tokens), whole)

    def fits(count: int) -> bool:
        _install(layers, _without(whole, order[:count]))
        limits = (loss * (1 + allowed) for loss in losses)
        return all(_loss(rows, tokens) <= limit for rows, limit in zip(probes, limits, strict=True))

    count = _most(len(order), fits, max(1, len(order) // PARTS))
    _install(layers, _without(whole, order[:count]))
    after = [_loss(rows, tokens) for rows in probes]
    return Pruned(
        bytes_before=before,
        bytes_after=sum(_bytes(*layer.factors()) for layer in layers.values()),
        ranks={name: len(layer.factors()[0]) for name, layer in layers.items()},
        losses_before=losses,
        losses_after=after,
    )


def _loss(rows: Rows, tokens: int) -> float:
    return measure(rows, range(len(rows.lengths)), tokens).loss


def components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product b a from its singular vectors, the greatest first, without those that are rounding.

    a: [rank, inputs] with orthonormal rows, b: [outputs, rank] with orthogonal columns.
    """
    if not len(a):
        return a, b
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.t())
    u, values, v = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
    kept = int((values > ZERO * values[0]).sum()) if values[0] > 0 else 0
    return (right.Q @ v.t()).t()[:kept].contiguous(), (left.Q @ (u * values))[:, :kept].contiguous()


def _install(layers: dict[str, LoRALinear], factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.clear()
        layer.settle(*factors[name])


def _importance(
    layers: dict[str, LoRALinear],
    whole: dict[str, tuple[Tensor, Tensor]],
    probes: Sequence[Rows],
    tokens: int,
) -> dict[str, Tensor]:
    """Of each layer's components: float32 [rank]. Losses of the probes count alike."""
    found = {name: torch.zeros(len(a)) for name, (a, _) in whole.items()}
    gates = {name: torch.ones(len(a), requires_grad=True) for name, (a, _) in whole.items()}
    for rows in probes:
        for part in rows.parts(range(len(rows.lengths)), tokens):
            for name, layer in layers.items():
                a, b = whole[name]
                layer.settled = a, b * gates[name]
            torch.autograd.backward(supervised(rows, part, rows.answer_tokens(range(len(rows.lengths)))))
            for name, gate in gates.items():
                if gate.grad is not None:
                    found[name].addcmul_(gate.grad, gate.grad)
                    gate.grad = None
    return found


def _order(importance: dict[str, Tensor], whole: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[str, int]]:
    """Components as (layer, number), the least important for their bytes first."""
    worth = [
        (float(value) / (whole[name][0].shape[1] + whole[name][1].shape[0]), name, number)
        for name, values in importance.items()
        for number, value in enumerate(values)
    ]
    return [(name, number) for _, name, number in sorted(worth)]


def _without(
    whole: dict[str, tuple[Tensor, Tensor]], out: Sequence[tuple[str, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    gone: dict[str, set[int]] = {}
    for name, number in out:
        gone.setdefault(name, set()).add(number)
    found = {}
    for name, (a, b) in whole.items():
        kept = [number for number in range(len(a)) if number not in gone.get(name, set())]
        found[name] = a[kept], b[:, kept]
    return found


def _most(limit: int, fits: Callable[[int], bool], near: int = 1) -> int:
    """The greatest of 0 to `limit` that fits, or one at most `near` less, as far as halving finds it; 0 is
    taken to fit."""
    low, high = 0, limit + 1
    while high - low > near:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _bytes(a: Tensor, b: Tensor) -> int:
    return 4 * (a.numel() + b.numel())
