"""The trial of a new version by the engine that would serve it: its answers, their speed, its perplexity.

An adapter is tried over its model, and of a draft head that it can be read for its model.

Two ways to run a version: `EngineTrial` loads it by itself, `PoolTrial` asks the daemon's pool, which makes
room as for any request. Prompts are answered one after the other and greedily, so that a repeat on the same
machine gives the same words.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

from lichen.adapters.draft_head import read_head
from lichen.errors import EngineError, NotFound, RequestError
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
        return await asyncio.to_thread(_perplexity, version, text, self._threads)

    @asynccontextmanager
    async def _running(self, version: Installed) -> AsyncIterator[ServedModel]:
        model = await asyncio.to_thread(self._load, version)
        try:
            async with _with(model, version) as whole:
                yield whole
        finally:
            await asyncio.shield(asyncio.to_thread(model.close))

    def _load(self, version: Installed) -> ServedModel:
        path, sha256 = version.path, version.sha256
        if version.base is not None:
            path, sha256 = version.base, version.base_sha256
        options = ModelOptions(context=CONTEXT, slots=1, threads=self._threads)
        fitted = memory.fitted(version.slot, check_gguf(path), options, memory.available(self._limit))
        return ServedModel.load(path, name=version.slot, sha256=sha256, options=fitted.options)


class PoolTrial(EngineTrial):
    """A trial in the daemon: the version is loaded beside the one that answers, as any other model.

    pool: on the event loop that this trial is awaited on.
    """

    def __init__(self, pool: ModelPool, *, threads: int) -> None:
        super().__init__(threads=threads)
        self._pool = pool

    @asynccontextmanager
    async def _running(self, version: Installed) -> AsyncIterator[ServedModel]:
        name = await self._model_of(version)
        keep_alive = KEPT_S if self._pool.served(name) is None else None  # what serves stays as it was
        async with self._pool.use(name, keep_alive) as model, _with(model, version) as whole:
            yield whole

    async def _model_of(self, version: Installed) -> str:
        """The name of the model to load: the version itself, or what it belongs to. Raises NotFound."""
        if version.base is None:
            return f"{version.slot.partition('/')[2]}-{version.sha256[:8]}"
        for candidate in await self._pool.known():
            if candidate.sha256 == version.base_sha256:
                return candidate.name
        raise NotFound(f"The model of {version.slot} is not here.")


@asynccontextmanager
async def _with(model: ServedModel, version: Installed) -> AsyncIterator[ServedModel]:
    """The model as it answers with the version. A draft head changes no answer: it is read, that it fits.

    Raises AdapterError, ModelFileError.
    """
    kind = version.slot.partition("/")[0]
    if kind == "adapters":
        adapted = await model.adapted(version.slot, version.sha256, version.path)
        try:
            yield adapted
        finally:
            adapted.release()
        return
    if kind == "checkpoints":
        words, hidden = model.engine.model.vocab_size, model.engine.context.hidden
        await asyncio.to_thread(
            read_head, version.path, base=version.base_sha256, vocabulary=words, hidden=hidden
        )
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


def _perplexity(version: Installed, text: str, threads: int) -> float:
    from lichen.quant.divergence import Tally

    adapter = version.path if version.slot.startswith("adapters/") else None
    scorer = NativeScorer(version.base or version.path, window=WINDOW, threads=threads, adapter=adapter)
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
