"""Losses over a large vocabulary, a part of the positions at a time.

The logits of 1,024 positions over 49,152 tokens take 200 MB, and a gradient through them twice that. Here
each part's logits are made, turned into the gradient of the hidden state, and let go before the next part
(as in Liger Kernel, Hsu et al., 2024, arXiv:2410.10989), so the output matrix is multiplied as often as
without the trick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lichen.errors import RequestError
from lichen.models.decoder import Decoder

LOGIT_BYTES = 32 << 20  # of one part's logits in float32: 170 positions of the default model

PartLoss: TypeAlias = Callable[[Tensor, slice], Tensor]
"""From a part of the hidden states and which part it is to its share of the loss, a scalar."""


class _SumOfParts(torch.autograd.Function):
    """Computes the gradients with the loss, and only scales them when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, loss: PartLoss, parts: Sequence[slice], wanted: bool, *trained: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if wanted else None
        sums = [torch.zeros_like(parameter) for parameter in trained]
        for part in parts:
            piece = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                share = loss(piece, part)
            total += share.detach()
            if gradient is not None:
                found = torch.autograd.grad(share, [piece, *trained], allow_unused=True)
                gradient[part] = found[0]
                for collected, new in zip(sums, found[1:], strict=True):
                    if new is not None:
                        collected.add_(new)
        ctx.save_for_backward(*([] if gradient is None else [gradient]), *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        hidden, *trained = (saved * gradients[0].to(saved.dtype) for saved in ctx.saved_tensors)
        return hidden, None, None, None, *trained


def sum_of_parts(hidden: Tensor, loss: PartLoss, vocabulary: int, trained: Sequence[Tensor] = ()) -> Tensor:
    """The sum of `loss` over parts of hidden [n, width], each with few enough logits; a scalar.

    trained: parameters that `loss` uses and that want a gradient (of an adapted output layer).
    """
    step = max(1, LOGIT_BYTES // (4 * vocabulary))
    parts = [slice(first, min(len(hidden), first + step)) for first in range(0, len(hidden), step)]
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or any(x.requires_grad for x in trained))
    total: Tensor = _SumOfParts.apply(hidden, loss, parts, wanted, *trained)  # type: ignore[no-untyped-call]
    return total


def cross_entropy(
    model: Decoder, hidden: Tensor, positions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The sum of -log p(target) over the chosen positions, in nats; a scalar.

    hidden: last hidden state [tokens, width]. positions: int64 [n], the tokens after which a target is
    due. targets: int64 [n]. weights: float32 [n], or None for 1 each. Divide by what the mean is over.
    Raises RequestError when the lengths differ or there is no position.
    """
    if not len(positions) or len(positions) != len(targets):
        raise RequestError(f"{len(positions)} positions cannot have {len(targets)} targets.")

    def loss(piece: Tensor, part: slice) -> Tensor:
        losses = functional.cross_entropy(model.logits(piece), targets[part], reduction="none")
        return losses.sum() if weights is None else losses @ weights[part]

    trained = [
        parameter
        for module in (model.output_norm, model.output)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    return sum_of_parts(hidden[positions], loss, model.vocabulary, trained)
