"""Drawing one sequence's tokens: grammar, sampler chain, log-probabilities, and the text they add up to.

Order at each token: log-probabilities of the model itself, then the grammar's mask, then the sampler
chain. Used by the engine thread only.

Of a sequence that is `scored`, every SCORED-th token is: -log p under the model itself, before temperature
and all other options. It takes some tenths of a millisecond for a vocabulary of 49,152, and changes no draw.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from lichen.errors import EngineError
from lichen.runtime.native import Context, Model, Sampler
from lichen.runtime.sampling import PENALTY_WINDOW, sampler_options
from lichen.runtime.sequence import Piece, TokenLogprob
from lichen.runtime.text import TextStream

if TYPE_CHECKING:
    from lichen.runtime.sequence import Sequence

SCORED = 4  # tokens of which one is scored


class Drawing:
    """What a sequence needs while it has a slot."""

    def __init__(self, model: Model, sequence: Sequence) -> None:
        options = sequence.options
        self._model, self._sequence = model, sequence
        self._constraint = sequence.constraint
        self._top = options.top_logprobs
        self._sampler = Sampler(model, sampler_options(options))
        for token in sequence.prompt[-PENALTY_WINDOW:]:
            self._sampler.accept(token)
        self._text = TextStream(options.stop)
        self._shown = 0  # bytes of text that were given out
        self._drawn = 0  # bytes of all tokens
        self._trail: deque[tuple[int, TokenLogprob]] = deque()  # (where its bytes begin, token)

    def draw(self, context: Context, index: int) -> int:
        """The token after batch entry `index`. Raises EngineError if the grammar fails."""
        sequence = self._sequence
        if not sequence.scored or sequence.drawn % SCORED:
            return self._draw(context, index)
        row = context.logits(index).copy()  # a grammar masks what the context holds
        token = self._draw(context, index)
        sequence.loss += _log_sum(row) - float(row[token])
        sequence.scored_tokens += 1
        return token

    def _draw(self, context: Context, index: int) -> int:
        if self._top is None and self._constraint is None:
            return self._sampler.sample(context, index)
        logits = context.logits(index)
        row = logits.copy() if self._top is not None else None
        if self._constraint is not None:
            self._constraint.mask(logits)
        token = self._sampler.sample(context, index)
        if self._constraint is not None:
            self._constraint.accept(token)
            if failure := self._constraint.failure:
                raise EngineError(f"The grammar of this answer became too complex: {failure}.")
        if row is not None and self._top is not None and not self._model.is_end(token):
            self._trail.append((self._drawn, _logprob(self._model, row, token, self._top)))
        return token

    def show(self, token: int, drafted: bool = False) -> Piece | None:
        """Text that is certain after this token, if any. drafted: the token had been guessed."""
        piece = self._model.piece(token)
        self._drawn += len(piece)
        return self._piece(self._text.feed(piece), drafted)

    def flush(self) -> Piece | None:
        """What is left once no more tokens come."""
        stopped = self._text.stopped
        piece = self._piece(self._text.flush())
        rest = () if stopped else tuple(entry for _, entry in self._trail)
        if not rest:
            return piece
        return Piece(piece.text if piece else "", (*(piece.tokens if piece else ()), *rest))

    @property
    def ended(self) -> bool:
        """Whether a stop string, or the end of the grammar, ends the answer here."""
        return self._text.stopped or (self._constraint is not None and self._constraint.complete)

    def close(self) -> None:
        """Free the sampler chain; idempotent."""
        self._sampler.close()

    def _piece(self, text: str, drafted: bool = False) -> Piece | None:
        if not text:
            return None
        if self._top is None:
            return Piece(text, drafted=drafted)
        self._shown += len(text.encode("utf-8", "replace"))
        tokens = []
        while self._trail and self._trail[0][0] < self._shown:
            tokens.append(self._trail.popleft()[1])
        return Piece(text, tuple(tokens), drafted)


def _log_sum(logits: Any) -> float:
    """Of exponentials of `logits` ([vocab] float32)."""
    import numpy as np

    top = logits.max()
    return float(top) + float(np.log(np.exp(logits - top).sum()))


def _logprob(model: Model, logits: Any, token: int, top: int) -> TokenLogprob:
    """Log-softmax of `logits` ([vocab] float32) at `token` and at the `top` likeliest."""
    import numpy as np

    shifted = logits - logits.max()
    total = float(np.log(np.exp(shifted, dtype=np.float64).sum()))
    best: list[int] = []
    if top:
        best = np.argpartition(shifted, -top)[-top:].tolist()
        best.sort(key=lambda candidate: (-float(shifted[candidate]), candidate))
    return TokenLogprob(
        token,
        model.piece(token),
        float(shifted[token]) - total,
        tuple((one, model.piece(one), float(shifted[one]) - total) for one in best),
    )
