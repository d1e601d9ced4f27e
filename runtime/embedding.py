"""Embeddings: one vector a text, from the model's last hidden states.

A context of its own over the same weights, made at the first request, used by the engine thread between two
steps, a chunk at a time, so that running streams go on. States are pooled here (mean, first or last token,
as the model file says; mean where it says nothing) and scaled to length 1.
Not covered: rerankers, and models with a separate encoder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lichen.errors import ContextOverflow, LichenError, RequestError
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.native import EmbeddingContext

if TYPE_CHECKING:
    from lichen.runtime.engine import Engine
    from lichen.runtime.native import Model

CHUNK = 256  # tokens between two steps of the engine
MAX_CONTEXT = 8192


class Embedder:
    """Embeds texts with one model. Safe to use from any number of tasks; they take turns."""

    def __init__(self, model: Model, engine: Engine, *, threads: int) -> None:
        self._model = model
        self._engine = engine
        self._threads = threads
        self._context: EmbeddingContext | None = None
        self._turn = asyncio.Lock()
        self.limit = min(engine.context.context, MAX_CONTEXT)
        engine.on_close(self._close)

    async def embed(self, tokens: Sequence[int], adaptation: Adaptation = PLAIN) -> list[float]:
        """The vector [width] of a tokenized text, of length 1. The adapter must be in memory meanwhile.

        Raises ContextOverflow for more than `limit` tokens, RequestError for none, Unavailable on closing.
        """
        if not tokens:
            raise RequestError("The input is empty.", param="input")
        if len(tokens) > self.limit:
            raise ContextOverflow(len(tokens), self.limit, param="input")
        async with self._turn:
            pooled = _Pooled(adaptation)
            step = CHUNK if self._model.causal else self.limit
            for start in range(0, len(tokens), step):
                await self._on_engine(list(tokens), start, step, pooled)
            return pooled.vector(self._model.pooling)

    async def _on_engine(self, tokens: list[int], start: int, step: int, pooled: _Pooled) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def work() -> None:
            error: BaseException | None = None
            try:
                pooled.add(self._states(tokens[start : start + step], start, pooled.adaptation))
            except LichenError as caught:
                error = caught
            loop.call_soon_threadsafe(_settle, done, error)

        self._engine.call(work)
        await done

    def _states(self, tokens: list[int], start: int, adaptation: Adaptation) -> Any:
        if self._context is None:
            self._context = EmbeddingContext(
                self._model,
                context=self.limit,
                batch=CHUNK if self._model.causal else self.limit,
                threads=self._threads,
            )
        self._engine.adapters.apply(adaptation, self._context)
        return self._context.states(tokens, start)

    def _close(self) -> None:
        if self._context is not None:
            self._engine.adapters.forget(self._context)
            self._context.close()
            self._context = None


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class _Pooled:
    """Running sum, first and last of a text's hidden states, each [width] float32."""

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self._count = 0
        self._sum: Any = None
        self._first: Any = None
        self._last: Any = None

    def add(self, states: Any) -> None:
        """More states [tokens, width]."""
        import numpy as np

        total = states.sum(axis=0, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._first = states[0].copy() if self._first is None else self._first
        self._last = states[-1].copy()
        self._count += len(states)

    def vector(self, pooling: str) -> list[float]:
        """The pooled vector, of length 1 (or all zero)."""
        import numpy as np

        chosen = {"first": self._first, "last": self._last}.get(pooling, self._sum / self._count)
        length = float(np.linalg.norm(chosen))
        scaled: list[float] = (chosen / length if length else chosen).astype(np.float32).tolist()
        return scaled
