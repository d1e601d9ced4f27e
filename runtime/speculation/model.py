"""The drafter that thinks: a smaller model, on a context of its own, says what the larger one will say.

It reads each sequence a piece at a time (`CATCH_UP` tokens a step), guesses greedily once it has caught up,
and stops where it is not sure itself. Its context has a slot for each slot of the engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lichen.runtime.native import DECODE_OK, Context, Model
from lichen.runtime.sequence import Sequence
from lichen.runtime.speculation.drafter import NOTHING, Draft
from lichen.runtime.speculation.vocabulary import TokenMap

if TYPE_CHECKING:
    from collections.abc import Callable

CATCH_UP = 64  # tokens that are read in one step of the engine
MIN_PROBABILITY = 0.4  # of a guess by the draft model's own account; below, the draft ends before it
FIRST_TOKEN_S = 1e-3  # what a guess is taken to cost before one was measured
SMOOTHING = 0.1


@dataclass(slots=True)
class _Reader:
    """One sequence: its slot, how many of its tokens were read, they in the draft model's words, and what
    the slot holds."""

    slot: int
    read: int = 0
    words: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


class ModelDrafter:
    """close: frees the context and then calls `release`, which frees the model."""

    name = "model"

    def __init__(self, context: Context, tokens: TokenMap, release: Callable[[], None]) -> None:
        self._context = context
        self._tokens = tokens
        self._release = release
        self._free = list(range(context.slots))
        self._readers: dict[int, _Reader] = {}  # by sequence id
        self._token_s = FIRST_TOKEN_S

    @classmethod
    def over(cls, target: Model, draft: Model, context: Context) -> ModelDrafter:
        """One that owns the draft model too. Raises ConfigError where the vocabularies cannot be mapped."""
        return cls(context, TokenMap(target, draft), draft.close)

    @property
    def token_s(self) -> float:
        """Measured seconds of one guess."""
        return self._token_s

    def begin(self, sequence: Sequence) -> None:
        """Take a slot."""
        slot = self._free.pop()
        self._context.clear(slot)
        self._readers[sequence.id] = _Reader(slot)

    def propose(self, sequence: Sequence, k: int) -> Draft:
        """At most `k` greedy guesses; nothing while the sequence is still being read."""
        reader = self._readers[sequence.id]
        reader.words += self._tokens.spelled(sequence.tokens[reader.read :])
        reader.read = len(sequence.tokens)
        if not reader.words or len(reader.words) + k >= self._context.context:
            return NOTHING
        logits = self._catch_up(reader)
        if logits is None:
            return NOTHING
        began = time.perf_counter()
        guesses: list[int] = []
        while len(guesses) < k and logits is not None:
            word = _sure(logits)
            token = None if word is None else self._tokens.spoken(word)
            if word is None or token is None:
                break
            guesses.append(token)
            logits = self._compute(reader, [word]) if len(guesses) < k else None
        if len(guesses) > 1:
            taken = (time.perf_counter() - began) / (len(guesses) - 1)
            self._token_s += SMOOTHING * (taken - self._token_s)
        return Draft(guesses, self.name) if guesses else NOTHING

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None:
        """What was wrong leaves the slot at the next proposal."""

    def end(self, sequence: Sequence) -> None:
        """Give the slot back."""
        reader = self._readers.pop(sequence.id, None)
        if reader is not None:
            self._free.append(reader.slot)

    def close(self) -> None:
        """Free the context and the model; idempotent."""
        self._readers.clear()
        self._context.close()
        self._release()

    def _catch_up(self, reader: _Reader) -> Any:
        """Read on; the logits [vocab] after the last word once all is read, else None."""
        same = 0
        for held, word in zip(reader.held, reader.words, strict=False):
            if held != word:
                break
            same += 1
        same = min(same, len(reader.words) - 1)  # the last word's logits are needed
        if same < len(reader.held):
            if not self._context.truncate(reader.slot, same):
                self._context.clear(reader.slot)
                same = 0
            del reader.held[same:]
        piece = reader.words[same : same + CATCH_UP]
        logits = self._compute(reader, piece)
        return logits if len(reader.held) == len(reader.words) else None

    def _compute(self, reader: _Reader, words: list[int]) -> Any:
        """Logits [vocab] after the last of these words; None when they could not be computed."""
        start, count = len(reader.held), len(words)
        outputs = [0] * count
        outputs[-1] = 1
        code = self._context.decode(words, list(range(start, start + count)), [reader.slot] * count, outputs)
        if code != DECODE_OK:
            self._context.clear(reader.slot)
            reader.held.clear()
            return None
        reader.held += words
        return self._context.logits(count - 1)


def _sure(logits: Any) -> int | None:
    """The likeliest word, if the model gives it at least MIN_PROBABILITY."""
    import numpy as np

    best = int(logits.argmax())
    total = float(np.exp(logits - logits[best]).sum())
    return best if 1.0 / total >= MIN_PROBABILITY else None
