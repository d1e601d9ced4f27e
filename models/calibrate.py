"""Gathers an importance matrix: the mean of the squared inputs of every linear layer over a text.

For a layer y = Wx, an error e in a column c of W changes y by e x_c, whose mean square is e^2 E[x_c^2]. (The
matrix is that of llama.cpp's imatrix; as a diagonal of the Hessian it goes back to LeCun et al., Optimal
Brain Damage, 1989.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lichen.errors import RequestError
from lichen.models.decoder import Decoder
from lichen.models.packing import pack
from lichen.quant.importance import Importance
from lichen.quant.linear import QuantLinear

BATCH = 1024  # tokens of one forward pass


def gather_importance(
    model: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
    text: str = "",
) -> Importance:
    """windows: token ids of stretches of text. progress: called with (tokens done, tokens in all).

    Raises RequestError without a window.
    """
    if not windows:
        raise RequestError("There is no text to calibrate with.")
    sums: dict[str, Tensor] = {}

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, QuantLinear)
        x = inputs[0].reshape(-1, module.in_features).double()
        total = sums.setdefault(module.tensor.name, torch.zeros(module.in_features, dtype=torch.float64))
        total += x.square().sum(0)

    hooks = [
        module.register_forward_pre_hook(count)
        for module in model.modules()
        if isinstance(module, QuantLinear)
    ]
    tokens, whole = 0, sum(map(len, windows))
    try:
        with torch.no_grad():
            for batch in batches(windows, BATCH):
                packed = pack(batch)
                hidden = model.run(model.embed(packed), packed)
                if isinstance(model.output, QuantLinear):  # its input alone: nobody wants the logits
                    count(model.output, (model.output_norm(hidden),))
                tokens += len(packed.tokens)
                if progress is not None:
                    progress(tokens, whole)
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: (total / tokens).float().reshape(1, -1).numpy() for name, total in sums.items()}
    return Importance(means, tokens=tokens, chunk=max(map(len, windows)), text=text)


def batches(windows: Iterable[Sequence[int]], tokens: int) -> Iterable[list[Sequence[int]]]:
    """Windows together, at most so many tokens at a time (but at least one window)."""
    batch: list[Sequence[int]] = []
    for window in windows:
        if batch and sum(map(len, batch)) + len(window) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
