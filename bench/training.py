"""Tokens a second of one training step over the quantized default model, and its peak memory.

    python -m bench.training MODEL [--steps N] [--sequences N] [--tokens N] [--rank N] [--upper] [--answers]

LoRA of that rank on every linear layer of the blocks (--upper: of the upper half, the lower half runs
without gradients), loss on every position (--answers: on the second half of each sequence). A bare
loop around the adapters of `lichen learn`, without its process, cache and checkpoints, which
`bench/learn.py` has. The best step counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from lichen.adapters.lora import attach, parameters
from lichen.adapters.task import LoRAOptions
from lichen.models.load import load_model
from lichen.models.loss import cross_entropy
from lichen.models.packing import Packed


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
    first = attach(model, LoRAOptions(rank=options.rank, first=None if options.upper else 0))
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-4)
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


if __name__ == "__main__":
    main()
