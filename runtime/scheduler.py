"""Which tokens the next step computes: a pure function of the live sequences and a budget.

Continuous batching with chunked prefill (the idea of Sarathi-Serve, arXiv 2403.02310). While prompts
wait, each of them may put `share` tokens between two tokens of the running streams, so a prompt slows a
stream by a known amount, and a burst of prompts is through before the streams go on.
Several short prompts go in smaller steps, the one with the fewest tokens left first, so that they end
one after another; waiting raises a prompt's rank steadily, so that none starves. It knows nothing of
llama.cpp, threads or clocks.

A step has one adaptation (llama.cpp applies an adapter to a whole context), and a deterministic sequence has
steps of its own, always of one shape. So the live sequences fall into parties, which take turns: the one
whose turn is the longest ago goes first. As each change of adaptation costs milliseconds (`docs/log.md`),
a party may keep its turn for a few steps, but not beyond the tokens that a step of prompts has.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from lichen.runtime.adaptation import Adaptation
from lichen.runtime.sequence import Sequence

PREFILL_SHARE = 64  # tokens of each waiting prompt between two of a stream: bounds the gaps
TURN_STEPS = 4  # that a party keeps its turn for while another waits

Party = Adaptation | int  # the id of a deterministic sequence


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

    @classmethod
    def of(cls, batch: int) -> Budget:
        """For a context that computes so many tokens in a step."""
        return cls(step=batch, prompts_step=max(1, batch // 4), share=min(PREFILL_SHARE, batch))


class Scheduler:
    """Packs steps. Invariants: no step exceeds its budget and none mixes adaptations; every live sequence
    advances within a bounded number of steps; between two tokens of a stream at most `share` prompt tokens
    of its party are computed for each prompt of it that waited meanwhile (as long as all streams fit in a
    step)."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._groups: dict[Adaptation, _Group] = {}
        self._turns: dict[Party, int] = {}  # when a live party had its last turn
        self._turn = 0
        self._party: Party | None = None  # whose turn it is
        self._steps = self._tokens = 0  # of this turn

    def plan(self, live: Iterable[Sequence]) -> list[Chunk]:
        """The next step's chunks, at most one a sequence; empty when nothing can be computed."""
        parties: dict[Party, list[Sequence]] = {}
        for sequence in live:
            party = sequence.id if sequence.options.deterministic else sequence.adaptation
            parties.setdefault(party, []).append(sequence)
        if not parties:
            return []
        party = self._next(parties)
        members = parties[party]
        if isinstance(party, int):
            (alone,) = members
            chunks = [Chunk(alone, alone.computed, min(alone.remaining, self.budget.step))]
        else:
            group = self._groups.setdefault(party, _Group(self.budget))
            chunks = group.plan(members)
        self._steps += 1
        self._tokens += sum(chunk.count for chunk in chunks)
        return chunks

    def _next(self, parties: dict[Party, list[Sequence]]) -> Party:
        """Whose step it is; whoever is gone is forgotten."""
        self._turns = {party: turn for party, turn in self._turns.items() if party in parties}
        self._groups = {party: group for party, group in self._groups.items() if party in parties}
        if isinstance(self._party, Adaptation) and self._party in parties:
            kept = self._steps < TURN_STEPS and self._tokens < self.budget.prompts_step
            if kept or len(parties) == 1:
                return self._party
        self._turn += 1
        self._party = min(parties, key=lambda party: self._turns.get(party, 0))
        self._turns[self._party] = self._turn
        self._steps = self._tokens = 0
        return self._party


class _Group:
    """The sequences of one adaptation, which share steps."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waited: dict[int, int] = {}  # sequence id -> tokens of other prompts computed before it
        self._between = 0  # prompt tokens computed since the streams had their last token
        self._burst: set[int] = set()  # ids of the prompts that waited since then

    def plan(self, live: list[Sequence]) -> list[Chunk]:
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
