"""Tokens a second of one training step over the quantized default model, and its peak memory.

    python -m bench.training MODEL [--steps N] [--sequences N] [--tokens N] [--rank N] [--upper] [--answers]

LoRA of that rank on every linear layer of the blocks (--upper: of the upper half, the lower half runs
without gradients), loss on every position (--answers: on the second half of each sequence). A minimal
trainer: it shows what `models/` costs, not what `adapters/` does. The best step counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from lichen.models.decoder import Decoder
from lichen.models.load import load_model
from lichen.models.loss import cross_entropy
from lichen.models.packing import Packed
from lichen.quant.linear import QuantLinear


class Adapted(nn.Module):
    """A frozen layer plus B A x, with B zero at first."""

    def __init__(self, layer: QuantLinear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, inputs] to [tokens, outputs]."""
        return torch.addmm(self.layer(x), x @ self.a.t(), self.b.t())


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name, default in (("steps", 4), ("sequences", 4), ("tokens", 256), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for flag in ("--upper", "--answers"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    model = load_model(options.model)
    first = len(model.blk) // 2 if options.upper else 0
    trained = adapt(model, first, options.rank)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    lengths = (options.tokens,) * options.sequences
    packed = Packed(torch.randint(model.vocabulary, (sum(lengths),)), lengths)
    within = torch.arange(sum(lengths)) % options.tokens
    chosen = (within < options.tokens - 1) & (within >= (options.tokens // 2 if options.answers else 0))
    positions = chosen.nonzero().squeeze(-1)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        with torch.no_grad():
            hidden = model.run(model.embed(packed), packed, stop=first)
        hidden = model.run(hidden, packed, start=first)
        loss = cross_entropy(model, hidden, positions, packed.tokens[positions + 1]) / len(positions)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    result = {
        "tokens_per_second": round(sum(lengths) / min(seconds), 1),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "upper": options.upper,
        "answers": options.answers,
    }
    print(json.dumps(result))


def adapt(model: Decoder, first: int, rank: int) -> list[nn.Parameter]:
    """Put adapters on the linear layers from block `first` up; their parameters."""
    trained: list[nn.Parameter] = []
    for block in model.blocks[first:]:
        for name, layer in list(block.named_children()):
            if isinstance(layer, QuantLinear):
                adapted = Adapted(layer, rank)
                block.register_module(name, adapted)
                trained += [adapted.a, adapted.b]
    return trained


if __name__ == "__main__":
    main()
