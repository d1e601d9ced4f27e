"""Root-mean-square normalization (Zhang and Sennrich, 2019, arXiv:1910.07467) with a lean gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Normalize(torch.autograd.Function):
    """Keeps x and one number a row for the gradient, where autograd would keep three tensors like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        numbers = x.float()
        scale = torch.linalg.vecdot(numbers, numbers).div_(x.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        normal: Tensor = (numbers * scale).mul_(weight)
        return normal.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        gradient, numbers = gradients[0].float(), x.float()
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            # y = x s w with s = (mean(x^2) + e)^-1/2, so dx = s (g w) - x s^3 mean(x g w)
            weighted = gradient * weight
            pull = torch.linalg.vecdot(weighted, numbers).div_(x.shape[-1]).unsqueeze(-1) * scale**3
            for_x = weighted.mul_(scale).sub_(numbers * pull).to(x.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = (gradient * numbers * scale).reshape(-1, x.shape[-1]).sum(0)
        return for_x, for_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight along the last dimension, computed in float32.

    weight: float32 [width], frozen unless `requires_grad_` says otherwise.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        y: Tensor = _Normalize.apply(x, self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return y
