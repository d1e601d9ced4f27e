"""Which tokens the next step computes: a pure function of the live sequences and a budget.

Continuous batching with chunked prefill (the idea of Sarathi-Serve, arXiv 2403.02310). While prompts
wait, each of them may put `share` tokens between two tokens of the running streams, so a prompt slows a
stream by a known amount, and a burst of prompts is through before the streams go on.
Several short prompts go in smaller steps, the one with the fewest tokens left first, so that they end
one after another; waiting raises a prompt's rank steadily, so that none starves. It knows nothing of
llama.cpp, threads or clocks.
A deterministic sequence has steps of its own, in turn with everybody else's, always of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from lichen.runtime.sequence import Sequence


@dataclass(slots=True, frozen=True)
class Chunk:
    """Compute `count` tokens of a sequence, from position `start`, and a draft of what may follow them.

    Only a chunk that completes may have a draft.
    """

    sequence: Sequence
    start: int
    count: int
    draft: Items[int] = ()

    @property
    def completes(self) -> bool:
        """Whether nothing is left to compute after it, so that a token can be drawn."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True, frozen=True)
class Budget:
    """Tokens that may be computed.

    step: in one step. prompts_step: of prompts in one step when several wait, unless the next one alone
    has more left. share: of each prompt between two tokens of a stream.
    """

    step: int
    prompts_step: int
    share: int


class Scheduler:
    """Packs steps. Invariants: no step exceeds its budget; every live sequence advances within a bounded
    number of steps; between two tokens of a stream at most `share` prompt tokens are computed for each
    prompt that waited meanwhile (as long as all streams fit in a step)."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waited: dict[int, int] = {}  # sequence id -> tokens of other prompts computed before it
        self._between = 0  # prompt tokens computed since the streams had their last token
        self._burst: set[int] = set()  # ids of the prompts that waited since then
        self._alone_last = 0  # id of the deterministic sequence that had the step before; 0: the others had

    def plan(self, live: Iterable[Sequence]) -> list[Chunk]:
        """The next step's chunks, at most one a sequence; empty when nothing can be computed."""
        everyone = list(live)
        alone = [sequence for sequence in everyone if sequence.options.deterministic]
        if not alone:
            return self._together(everyone)
        others = [sequence for sequence in everyone if not sequence.options.deterministic]
        later = [sequence for sequence in alone if sequence.id > self._alone_last]
        if not later and others:
            self._alone_last = 0
            return self._together(others)
        chosen = min(later or alone, key=lambda sequence: sequence.id)
        self._alone_last = chosen.id
        return [Chunk(chosen, chosen.computed, min(chosen.remaining, self.budget.step))]

    def _together(self, live: list[Sequence]) -> list[Chunk]:
        streams: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in live:
            (streams if sequence.drawn and sequence.remaining == 1 else prompts).append(sequence)
        budget = self.budget
        if prompts and streams:
            self._burst.update(sequence.id for sequence in prompts)
        else:
            self._between, self._burst = 0, set()  # nobody waits for the other
        ranked = sorted(prompts, key=lambda s: (s.remaining - self._waited.get(s.id, 0), s.id))
        room = max(budget.prompts_step, min(budget.step, ranked[0].remaining)) if ranked else 0
        allowed = budget.share * len(self._burst) - self._between
        if streams and prompts and allowed >= room:
            chunks = self._prefill(ranked, room)  # the streams' next tokens can wait for these
            self._between += sum(chunk.count for chunk in chunks)
            return chunks
        chunks = [Chunk(sequence, sequence.computed, 1) for sequence in streams[: budget.step]]
        if streams:
            room = min(room, max(allowed, 1), budget.step - len(chunks))
            self._between, self._burst = 0, set()
        return chunks + self._prefill(ranked, room)

    def _prefill(self, ranked: list[Sequence], room: int) -> list[Chunk]:
        """Chunks of at most `room` tokens in all, in that order, and what it means for who waited."""
        chunks: list[Chunk] = []
        left = room
        for sequence in ranked:
            count = min(left, sequence.remaining)
            if count > 0:
                chunks.append(Chunk(sequence, sequence.computed, count))
                left -= count
        given = {chunk.sequence.id: chunk.count for chunk in chunks}
        self._waited = {s.id: self._waited.get(s.id, 0) + (room - left) - given.get(s.id, 0) for s in ranked}
        return chunks
