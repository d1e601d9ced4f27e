"""Which tokens the next step computes: a pure function of the live sequences and two budgets.

Continuous batching with chunked prefill (the idea of Sarathi-Serve, arXiv 2403.02310): every decoding
sequence gets its one token in every step; what is left of the budget goes to prompts in chunks.
While others decode, the share of prompts is bounded so that a long prompt slows a stream by at most a
known factor; the more prompts wait, the larger their share, up to the whole step.
Among prompts the one with the fewest tokens left goes first, but waiting lowers its
rank steadily, so that no prompt starves. It knows nothing of llama.cpp, threads or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lichen.runtime.sequence import Sequence


@dataclass(slots=True, frozen=True)
class Chunk:
    """Compute `count` tokens of a sequence, from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether nothing is left to compute after it, so that a token can be drawn."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True, frozen=True)
class Budget:
    """Tokens a step may compute: in all, and for each waiting prompt while other sequences decode."""

    step: int
    prefill_while_decoding: int


class Scheduler:
    """Packs steps. Invariants: no step exceeds its budget; every live sequence advances within a bounded
    number of steps; decoding sequences advance in every step (as long as they fit in the budget)."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waited: dict[int, int] = {}  # sequence id -> tokens of other prompts computed before it

    def plan(self, live: Iterable[Sequence]) -> list[Chunk]:
        """The next step's chunks, at most one a sequence; empty when nothing can be computed."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in live:
            (decoding if sequence.drawn and sequence.remaining == 1 else prefilling).append(sequence)
        chunks = [Chunk(s, s.computed, 1) for s in decoding[: self.budget.step]]
        room = self.budget.step - len(chunks)
        if decoding:
            room = min(room, self.budget.prefill_while_decoding * len(prefilling))
        if prefilling:
            chunks.extend(self._prefill(prefilling, room))
        return chunks

    def _prefill(self, prefilling: list[Sequence], room: int) -> list[Chunk]:
        ranked = sorted(prefilling, key=lambda s: (s.remaining - self._waited.get(s.id, 0), s.id))
        chunks: list[Chunk] = []
        left = room
        for sequence in ranked:
            count = min(left, sequence.remaining)
            if count > 0:
                chunks.append(Chunk(sequence, sequence.computed, count))
                left -= count
        given = {chunk.sequence.id: chunk.count for chunk in chunks}
        self._waited = {
            s.id: self._waited.get(s.id, 0) + (room - left) - given.get(s.id, 0) for s in prefilling
        }
        return chunks
