"""LoRA (Hu et al., 2021, arXiv:2106.09685) over quantized layers: wrap, forward, delta, merge.

The stored weights stay the mapped bytes of the file; only A and B are in memory and have gradients. Rows
are in the order of the file, so that an adapter for llama.cpp needs no permutation (`models/rope.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from lichen.adapters.task import LoRAOptions
from lichen.errors import TrainingError
from lichen.models.decoder import Decoder
from lichen.quant.linear import QuantLinear


class LoRALinear(nn.Module):
    """A frozen layer plus scale B A x. a: float32 [rank, inputs], b: float32 [outputs, rank].

    settled: what earlier lessons left, which is frozen too: a [rank, inputs] and b [outputs, rank] of its
    own, whose scale is 1.
    """

    def __init__(self, layer: QuantLinear, rank: int, scale: float, source: torch.Generator) -> None:
        """A is uniform within 1 / sqrt(inputs), as Hu et al.'s own code has it, and B is zero."""
        super().__init__()
        self.layer, self.rank, self.scale = layer, rank, scale
        self.enabled = True
        self.settled: tuple[Tensor, Tensor] | None = None
        self._taken: Tensor | None = None  # orthonormal [inputs, rank]: directions that settled reads
        bound = layer.in_features**-0.5
        self.a = nn.Parameter(torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=source))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to [..., outputs]."""
        y: Tensor = self.layer(x)
        if not self.enabled:
            return y
        if self.settled is not None:
            y = y + functional.linear(functional.linear(x, self.settled[0]), self.settled[1])
        if not self.rank:
            return y
        narrow = functional.linear(x, self.a.to(x.dtype))  # [..., rank]
        return y + functional.linear(narrow * self.scale, self.b.to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """All that it adds, settled and trained, as one product: a [ranks, inputs] and b [outputs, ranks]."""
        a, b = self.a.detach(), self.b.detach() * self.scale
        if self.settled is None:
            return a, b
        return torch.cat([self.settled[0], a]), torch.cat([self.settled[1], b], dim=1)

    def settle(self, a: Tensor, b: Tensor) -> None:
        """Take a [rank, inputs] and b [outputs, rank] as what earlier lessons left."""
        self.settled = a, b
        self._taken = torch.linalg.qr(a.t()).Q if len(a) else None
        self.step_aside()

    def clear(self) -> None:
        """Take out all that it adds, and train nothing any more."""
        self.rank, self.settled, self._taken = 0, None, None
        self.a = nn.Parameter(torch.zeros(0, self.layer.in_features), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(self.layer.out_features, 0), requires_grad=False)

    def step_aside(self) -> None:
        """Take out of A what reads the directions that settled reads: a new lesson leaves them alone.

        O-LoRA's constraint (Wang et al., 2023, arXiv:2310.14152), exact instead of by a penalty.
        """
        if self._taken is not None:
            self.a.data.sub_(self.a.data @ self._taken @ self._taken.t())

    def delta(self) -> Tensor:
        """What the adapter adds to the weights: float32 [outputs, inputs]."""
        a, b = self.factors()
        return b @ a

    def merged(self) -> nn.Linear:
        """One ordinary layer that does the same, in float32."""
        layer = self.layer.dense()
        layer.weight.data.add_(self.delta())
        return layer


def attach(model: Decoder, options: LoRAOptions, seed: int = 0) -> int:
    """Put adapters into a model, from block `options.first` up; the number of that block.

    Hidden state `first` and those below stay as they were. Raises TrainingError for a block or a target
    that the model does not have, or a rank that one of its layers is too small for.
    """
    first = len(model.blk) // 2 if options.first is None else options.first
    if not 0 <= first < len(model.blk) or not options.targets:
        raise TrainingError(
            f"Adapters from block {first} on are none: the model has blocks 0 to {len(model.blk) - 1}."
        )
    source = torch.Generator().manual_seed(seed)
    for block in model.blocks[first:]:
        for target in options.targets:
            layer = getattr(block, target, None)
            if not isinstance(layer, QuantLinear):
                raise TrainingError(f"{target} is no layer of this model that an adapter can stand on.")
            if options.rank > min(layer.in_features, layer.out_features):
                raise TrainingError(
                    f"Rank {options.rank} is more than {layer.tensor.name} has rows or columns.",
                    hint="Lower the rank.",
                )
            block.register_module(target, LoRALinear(layer, options.rank, options.scale, source))
    return first


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapter with the name of its layer in the file, such as blk.3.attn_q."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """All of A and B, in a fixed order."""
    return [parameter for _, layer in adapted(model) for parameter in (layer.a, layer.b)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was, within the block."""
    layers = [layer for _, layer in adapted(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merge(model: nn.Module) -> None:
    """Put one ordinary layer in the place of each adapted one, for `models.export`."""
    for name, layer in list(adapted(model)):
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, layer.merged())
