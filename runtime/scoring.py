"""A model's logits for stretches of text, computed by the engine that serves it, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lichen.errors import EngineError, RequestError
from lichen.quant.gguf_check import check_gguf
from lichen.runtime import native

if TYPE_CHECKING:
    from lichen.quant.divergence import Logits, Vector


def stretches(tokens: Sequence[int], length: int, count: int | None = None) -> list[list[int]]:
    """Stretches of `length` tokens, evenly spread over a text, at most `count` (None: as many as there are).

    Raises RequestError when the text is shorter than one.
    """
    whole = len(tokens) // length
    if not whole:
        raise RequestError(
            f"The text has {len(tokens)} tokens, fewer than one stretch of {length}.",
            hint="Give a longer text, or shorter stretches.",
        )
    wanted = whole if count is None else min(count, whole)
    return [list(tokens[length * (index * whole // wanted) :][:length]) for index in range(wanted)]


class NativeScorer:
    """Scores text with a file's model, at most `window` tokens at a time.

    adapter: a LoRA adapter's file, which `check_adapter` has passed. Raises ModelFileError, EngineError,
    AdapterError.
    """

    def __init__(self, path: Path, *, window: int, threads: int, adapter: Path | None = None) -> None:
        check_gguf(path)
        self.model = native.Model(path)
        size = native.ContextSize(context=window, slots=1, threads=threads, batch=window, outputs=window)
        self._context = native.Context(self.model, size)
        self._adapter = None if adapter is None else native.Adapter(self.model, adapter)
        if self._adapter is not None:
            self._context.adapt(self._adapter, 1.0)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """float32 [tokens, vocabulary] of one stretch that nothing comes before, copied."""
        import numpy as np

        self._context.clear(0)
        self._decode(tokens, 0, all_outputs=True)
        out = np.empty((len(tokens), self.model.vocab_size), np.float32)
        for index in range(len(tokens)):
            out[index] = self._context.logits(index)
        return out

    def next_logits(self, tokens: Sequence[int]) -> Vector:
        """float32 [vocabulary] of what follows tokens, of which all but the last were given the last time."""
        last = len(tokens) - 1
        if not last:
            self._context.clear(0)
        self._decode(tokens[last:], last, all_outputs=False)
        logits: Vector = self._context.logits(0).copy()
        return logits

    def speed(self, tokens: Sequence[int], *, generated: int = 64) -> tuple[float, float]:
        """Tokens a second: of reading `tokens` (half a window at most), and of making some after them."""
        self._context.clear(0)
        prompt = list(tokens)[: self._context.context - generated]
        started = time.perf_counter()
        self._decode(prompt, 0, all_outputs=False)
        read = time.perf_counter()
        last = int(self._context.logits(len(prompt) - 1).argmax())
        for step in range(generated):
            self._decode([last], len(prompt) + step, all_outputs=False)
            last = int(self._context.logits(0).argmax())
        made = time.perf_counter()
        return len(prompt) / (read - started), generated / (made - read)

    def close(self) -> None:
        """Give the memory back; idempotent."""
        self._context.close()
        if self._adapter is not None:
            self._adapter.close()
        self.model.close()

    def _decode(self, tokens: Sequence[int], start: int, *, all_outputs: bool) -> None:
        count = len(tokens)
        outputs = [1] * count if all_outputs else [0] * (count - 1) + [1]
        code = self._context.decode(list(tokens), list(range(start, start + count)), [0] * count, outputs)
        if code != native.DECODE_OK:
            raise EngineError(f"The engine could not score this text: decoding failed with code {code}.")
