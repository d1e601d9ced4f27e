"""What a drafter is: something that guesses how a sequence goes on. One file each: `suffix.py`, `model.py`,
`head.py`.

Called by the engine thread only, between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lichen.runtime.sequence import Sequence

if TYPE_CHECKING:
    from lichen.runtime.native import Context

MAX_DRAFT = 16  # tokens of one sequence in one step


@dataclass(slots=True, frozen=True)
class Draft:
    """Guessed tokens. kind: drafts of one kind are about equally reliable; what is learned of one (how often
    it was right) holds for the others."""

    tokens: list[int]
    kind: str


NOTHING = Draft([], "")


class Drafter(Protocol):
    """Guesses; whether a guess is worth a wider step is decided elsewhere (`control.py`).

    name: also the kind of all its drafts, where `token_s` is not 0. token_s: measured seconds that one
    drafted token costs; 0 for next to nothing.
    """

    name: str

    @property
    def token_s(self) -> float: ...

    def begin(self, sequence: Sequence) -> None:
        """A sequence got its slot."""

    def propose(self, sequence: Sequence, k: int) -> Draft:
        """At most `k` tokens that may follow `sequence.tokens`; `NOTHING` is an answer."""
        ...

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None:
        """The first `accepted` tokens of a draft were right; `sequence.tokens` tells what came instead."""

    def end(self, sequence: Sequence) -> None:
        """The sequence leaves its slot."""

    def close(self) -> None:
        """The engine ends; idempotent. May block for a moment."""


class StateReader(Protocol):
    """Looks at what the model computed before tokens are drawn from it. Called by the engine thread."""

    def begin(self, sequence: Sequence) -> None:
        """A sequence got its slot."""

    def read(self, sequence: Sequence, context: Context, index: int) -> None:
        """The token after `sequence.tokens` is about to be drawn from batch entry `index`, for which the
        context has logits and a hidden state. Both are gone after the step."""

    def end(self, sequence: Sequence) -> None:
        """The sequence leaves its slot; idempotent."""

    def close(self) -> None:
        """The engine ends; idempotent. May block for a moment."""
