"""The drafter that looks things up: how did this text, or an earlier answer, go on after these tokens?

Needs no model and costs microseconds. Good at what repeats: quoting, editing, code, forms, loops.
"""

from __future__ import annotations

from lichen.runtime.sequence import Sequence
from lichen.runtime.speculation.answers import AnswerMemories
from lichen.runtime.speculation.drafter import NOTHING, Draft
from lichen.runtime.speculation.index import MAX_MATCH, NONE, SuffixIndex

_REACHES = (3, 5, 9, 17)  # lengths of match at which another kind of draft begins


class SuffixDrafter:
    """One index for each live sequence (its prompt and answer), and the past answers of its owner."""

    name = "suffix"
    token_s = 0.0

    def __init__(self, memories: AnswerMemories | None = None) -> None:
        self._memories = memories
        self._indexes: dict[int, SuffixIndex] = {}  # by sequence id

    def begin(self, sequence: Sequence) -> None:
        """Nothing is indexed yet: the first proposal does that, where there is one."""
        self._indexes[sequence.id] = SuffixIndex()
        if self._memories is not None:
            self._memories.open(sequence.owner)

    def propose(self, sequence: Sequence, k: int) -> Draft:
        """The best continuation that the sequence itself or its owner's answers know."""
        own = self._indexes[sequence.id]
        own.extend(sequence.tokens[len(own.tokens) :])
        tail = sequence.tokens[-MAX_MATCH:]
        best, source = own.continuation(tail, k), "text"
        if self._memories is not None:
            for index in self._memories.open(sequence.owner).indexes:
                found = index.continuation(tail, k)
                if found[1] > best[1]:
                    best, source = found, "memory"
        if best is NONE:
            return NOTHING
        tokens, _, match = best
        return Draft(tokens, f"{self.name}/{source}/{sum(match >= reach for reach in _REACHES)}")

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None:
        """What was right is in the sequence's tokens, which the next proposal reads."""

    def end(self, sequence: Sequence) -> None:
        """Remember the answer for its owner."""
        if self._indexes.pop(sequence.id, None) is not None and self._memories is not None:
            self._memories.add(sequence.owner, sequence.tokens[len(sequence.prompt) :])

    def close(self) -> None:
        """Write what is remembered."""
        if self._memories is not None:
            self._memories.close()
