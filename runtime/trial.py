"""The trial of a new version by the engine that would serve it: its answers, their speed, its perplexity.

Two ways to run a version: `EngineTrial` loads it by itself, `PoolTrial` asks the daemon's pool, which makes
room as for any request. Prompts are answered one after the other and greedily, so that a repeat on the same
machine gives the same words.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

from lichen.errors import EngineError, RequestError
from lichen.quant.gguf_check import check_gguf
from lichen.runtime import memory
from lichen.runtime.scoring import NativeScorer, stretches
from lichen.runtime.sequence import Finished, Piece, SamplingOptions
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.sync.updates.health import Answer, Installed, Prompt

if TYPE_CHECKING:
    from lichen.runtime.pool import ModelPool

CONTEXT = 2048  # tokens; a health prompt and its answer have fewer
KEPT_S = 20.0  # that a version stays loaded behind its trial, for the daemon to move to
WINDOW = 256  # tokens of a stretch of the scored text


class EngineTrial:
    """`sync.updates.health.Trial` in this process. threads: to compute with.

    memory_limit: bytes for this process, 0 for 80 % of the machine's. Raises OutOfMemory among others.
    """

    def __init__(self, *, threads: int, memory_limit: int = 0) -> None:
        self._threads, self._limit = threads, memory_limit

    async def answers(self, version: Installed, prompts: tuple[Prompt, ...]) -> list[Answer]:
        """See Trial."""
        async with self._running(version) as model:
            return [await _answer(model, prompt) for prompt in prompts]

    async def perplexity(self, version: Installed, text: str) -> float:
        """See Trial."""
        return await asyncio.to_thread(_perplexity, version.path, text, self._threads)

    @asynccontextmanager
    async def _running(self, version: Installed) -> AsyncIterator[ServedModel]:
        model = await asyncio.to_thread(self._load, version)
        try:
            yield model
        finally:
            await asyncio.shield(asyncio.to_thread(model.close))

    def _load(self, version: Installed) -> ServedModel:
        options = ModelOptions(context=CONTEXT, slots=1, threads=self._threads)
        free = memory.available(self._limit)
        fitted = memory.fitted(version.slot, check_gguf(version.path), options, free)
        return ServedModel.load(
            version.path, name=version.slot, sha256=version.sha256, options=fitted.options
        )


class PoolTrial(EngineTrial):
    """A trial in the daemon: the version is loaded beside the one that answers, as any other model.

    pool: on the event loop that this trial is awaited on.
    """

    def __init__(self, pool: ModelPool, *, threads: int) -> None:
        super().__init__(threads=threads)
        self._pool = pool

    @asynccontextmanager
    async def _running(self, version: Installed) -> AsyncIterator[ServedModel]:
        name = f"{version.slot.partition('/')[2]}-{version.sha256[:8]}"
        keep_alive = KEPT_S if self._pool.served(name) is None else None  # what serves stays as it was
        async with self._pool.use(name, keep_alive) as model:
            yield model


async def _answer(model: ServedModel, prompt: Prompt) -> Answer:
    """One greedy answer, not drafted, so that speed is the model's own. Raises LichenError."""
    options = SamplingOptions(
        max_tokens=prompt.max_tokens, temperature=0.0, top_k=1, speculation=False, seed=0
    )
    (generation,) = await model.chat([{"role": "user", "content": prompt.text}], options)
    said: list[str] = []
    with closing(generation):
        async for event in generation:
            if isinstance(event, Piece):
                said.append(event.text)
            elif isinstance(event, Finished):
                tokens = max(0, event.usage.completion_tokens - 1)  # the first comes from the prompt's pass
                return Answer(text="".join(said), tokens=tokens, seconds=event.timings.decode_s)
    raise EngineError("The version's answer broke off.")


def _perplexity(path: Path, text: str, threads: int) -> float:
    from lichen.quant.divergence import Tally

    scorer = NativeScorer(path, window=WINDOW, threads=threads)
    try:
        tokens = scorer.model.tokenize(text, special=False, add_bos=False)
        if len(tokens) < 2:
            raise RequestError("The text that the version is to be scored on is too short.")
        tally = Tally()
        for stretch in stretches(tokens, min(WINDOW, len(tokens))):
            tally.add(scorer.logits(stretch)[:-1], stretch[1:])
        return float(tally.result()["perplexity"])
    finally:
        scorer.close()
