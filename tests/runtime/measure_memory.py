"""In a process of its own: load a model through the pool, use every slot, unload; figures as JSON.

python -m tests.runtime.measure_memory MODEL CONTEXT SLOTS BATCH
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from lichen.api import load_file
from lichen.quant.gguf_check import check_gguf
from lichen.runtime import memory, native
from lichen.runtime.memory import Fitted
from lichen.runtime.pool import ModelPool
from lichen.runtime.resident import Candidate
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.served_model import ModelOptions, ServedModel


class OneFile:
    """A shelf with one file, loaded with exactly these options."""

    def __init__(self, path: Path, options: ModelOptions) -> None:
        self._candidate = Candidate(name=path.stem, path=path)
        self._fitted = Fitted(options=options, estimate=memory.estimate(check_gguf(path), options))

    def known(self) -> list[Candidate]:
        return [self._candidate]

    def find(self, name: str) -> Candidate:
        return self._candidate

    def fit(self, candidate: Candidate, free: int | None) -> Fitted:
        return self._fitted

    def load(self, candidate: Candidate, fitted: Fitted, progress: Callable[[float], bool]) -> ServedModel:
        return load_file(candidate.path, name=candidate.name, sha256="", fitted=fitted, progress=progress)


async def measure(path: Path, options: ModelOptions) -> dict[str, int]:
    native.system_info()  # the library itself belongs to no model
    pool = ModelPool(OneFile(path, options))
    async with pool.use() as model:
        length = min(options.batch, model.info.context - 8)
        lengths = [length] + [min(length, 16)] * (options.slots - 1)  # one whole batch, and every slot
        prompts = [[50 + number] * count for number, count in enumerate(lengths)]
        sampling = SamplingOptions(max_tokens=4, temperature=0.8)
        answers = [await model.complete(prompt, sampling) for prompt in prompts]
        await asyncio.gather(*(answer.text() for (answer,) in answers))
        estimate = model.fitted.estimate.total if model.fitted else 0
    (status,) = pool.loaded()
    return {
        "estimate": estimate,
        "measured": status.measured_bytes,
        "freed": await pool.unload(),
        "rest": memory.resident(),
    }


if __name__ == "__main__":
    context, slots, batch = (int(word) for word in sys.argv[2:5])
    chosen = ModelOptions(context=context, slots=slots, threads=2, batch=batch, queue=64)
    print(json.dumps(asyncio.run(measure(Path(sys.argv[1]), chosen))))
