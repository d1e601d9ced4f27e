"""Tokens a second and peak memory of learning over the default model.

    python -m bench.learning_speed MODEL [--lessons N] [--tokens N] [--epochs N] [--rank N]

A real trainer process over random lessons, half of each the answer. The first epoch computes the frozen
lower half, the later ones read it. Prints one JSON line; the best step of each epoch counts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import psutil

from lichen.adapters.events import Finished, Stepped
from lichen.adapters.launch import Training, prepare
from lichen.adapters.task import Example, Examples, LoRAOptions, Task


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name, default in (("lessons", 16), ("tokens", 256), ("epochs", 2), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    source = random.Random(0)
    half = options.tokens // 2
    lessons = [
        Example(*([source.randrange(1000, 40000) for _ in range(half)] for _ in range(2)))
        for _ in range(options.lessons)
    ]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            name="bench",
            model=str(options.model.resolve()),
            output=folder,
            lora=LoRAOptions(rank=options.rank),
            epochs=options.epochs,
            batch=4,
            threads=psutil.cpu_count(logical=False) or 1,
        )
        prepare(Path(folder) / "job", task, Examples(train=lessons))
        events = list(Training(Path(folder) / "job"))
    steps = [event for event in events if isinstance(event, Stepped)]
    best = {
        f"epoch_{epoch + 1}": round(max(step.tokens_per_second for step in steps if step.epoch == epoch), 1)
        for epoch in range(options.epochs)
    }
    (finished,) = (event for event in events if isinstance(event, Finished))
    print(json.dumps({"tokens_per_second": best, "peak_megabytes": round(finished.memory / 1e6)}))


if __name__ == "__main__":
    main()
