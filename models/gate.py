"""Gated activations of feed-forward layers (Shazeer, 2020, arXiv:2002.05202) with a lean gradient."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Activation(Enum):
    """What the gate goes through before it is multiplied with the other half."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"  # the tanh approximation, as ggml computes it


_FORWARD: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}
_BACKWARD: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    Activation.SILU: torch.ops.aten.silu_backward,
    Activation.GELU_TANH: lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
}


class _Gated(torch.autograd.Function):
    """Computes the activation again for the gradient, where autograd would keep it: a tensor less a layer."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _FORWARD[activation](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        for_up = _FORWARD[ctx.activation](gate).mul_(gradient)
        return _BACKWARD[ctx.activation](gradient * up, gate), for_up, None


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, all of one shape."""
    y: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y
