"""The drafter that reads the model's mind: a small head over its last hidden state guesses what comes next.

The head itself is `adapters/draft_head.py`. It takes a tenth of a millisecond for a token, and says how sure
it is: guesses that it is equally sure of are one kind of draft, so the controller learns for which of them a
wider step pays here. A head can be changed between two steps (`swap`), and there need not be one yet.
"""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING

from lichen.runtime.sequence import Sequence
from lichen.runtime.speculation.drafter import NOTHING, Draft

if TYPE_CHECKING:
    from lichen.adapters.draft_head import DraftHead, Floats
    from lichen.runtime.native import Context

LEAST = 0.25  # probability of a whole draft, by the head's own account, below which it ends
_REACHES = (0.4, 0.6, 0.75, 0.9, 0.97)  # of the first guess, at which another kind of draft begins
PATIENCE = 24  # guesses in a row that nobody wanted, after which it rests
LONGEST_REST = 480  # steps; each rest in a row is twice as long as the one before


class HeadDrafter:
    """Drafter and reader of states."""

    name = "head"
    token_s = 0.0  # next to nothing

    def __init__(self, head: DraftHead | None = None) -> None:
        self._head = head
        self._states: dict[int, tuple[int, Floats]] = {}  # sequence id -> tokens known then, state after them
        self._unwanted = 0
        self._rest, self._resting = PATIENCE, 0

    @property
    def head(self) -> DraftHead | None:
        """What it guesses with."""
        return self._head

    def swap(self, head: DraftHead | None) -> None:
        """Guess with another head from the next step on."""
        self._head = head
        self._unwanted = self._resting = 0
        self._rest = PATIENCE

    def begin(self, sequence: Sequence) -> None:
        """Its first state comes with its second token."""

    def read(self, sequence: Sequence, context: Context, index: int) -> None:
        """Keep the state from which the next token is drawn."""
        if self._head is not None:
            self._states[sequence.id] = (len(sequence.tokens), context.state(index).copy())

    def propose(self, sequence: Sequence, k: int) -> Draft:
        """Its guesses, as long as it is rather sure of them."""
        if self._head is None or k <= 0 or self._rests():
            return NOTHING
        known, state = self._states.get(sequence.id, (0, None))
        if state is None or known != len(sequence.tokens) - 1:
            return NOTHING  # the last step also read a prompt, and gave no states
        tokens, chances = self._head.guess(state, sequence.tokens[-1], k, LEAST)
        self._unwanted += 1
        return Draft(tokens, f"{self.name}/{bisect(_REACHES, chances[0])}") if tokens else NOTHING

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None:
        """Somebody wanted this draft."""
        self._unwanted, self._rest = 0, PATIENCE

    def end(self, sequence: Sequence) -> None:
        """Forget its state."""
        self._states.pop(sequence.id, None)

    def close(self) -> None:
        """Nothing is kept."""
        self._states.clear()

    def _rests(self) -> bool:
        """Whether it leaves this step out, since its guesses have not been worth a wider step for long."""
        if self._resting:
            self._resting -= 1
            return True
        if self._unwanted < PATIENCE:
            return False
        self._unwanted, self._resting = 0, self._rest - 1
        self._rest = min(LONGEST_REST, 2 * self._rest)
        return True
