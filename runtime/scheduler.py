"""Which tokens the next step computes: a pure function of the live sequences and a budget.

Continuous batching with chunked prefill (the idea of Sarathi-Serve, arXiv 2403.02310). While prompts
wait, each of them may put `share` tokens between two tokens of the running streams, so a prompt slows a
stream by a known amount, and a burst of prompts is through before the streams go on.
Several short prompts go in smaller steps, the one with the fewest tokens left first, so that they end
one after another; waiting raises a prompt's rank steadily, so that none starves. What a request wants
(`SamplingOptions.intent`) gives its prompt a bounded head start in that order, and another share. It knows
nothing of llama.cpp, threads or clocks.

A step has one adaptation (llama.cpp applies an adapter to a whole context), and a deterministic sequence has
steps of its own, always of one shape. So the live sequences fall into parties, which take turns: the one
whose turn is the longest ago goes first. As each change of adaptation costs milliseconds (`docs/log.md`),
a party may keep its turn for a few steps, but not beyond the tokens that a step of prompts has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from lichen.devices.intent import Intent
from lichen.runtime.adaptation import Adaptation
from lichen.runtime.sequence import Sequence

PREFILL_SHARE = 64  # tokens of each waiting prompt between two of a stream: bounds the gaps
TURN_STEPS = 4  # that a party keeps its turn for while another waits

Party = Adaptation | int  # the id of a deterministic sequence
# Tokens by which a prompt counts as shorter than it is.
HEAD_START: Mapping[Intent, int] = {"latency": 4096, "throughput": -4096, "battery": -4096}
_PATIENT = 4  # the part of a share that the prompts of patient requests get


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
    def of(cls, batch: int, share: int = PREFILL_SHARE) -> Budget:
        """For a context that computes so many tokens in a step."""
        return cls(step=batch, prompts_step=max(1, batch // 4), share=min(share, batch))


class Scheduler:
    """Packs steps. Invariants: no step exceeds its budget and none mixes adaptations; every live sequence
    advances within a bounded number of steps; between two tokens of a stream at most `share` prompt tokens
    of its party are computed for each prompt of it that waited meanwhile, a whole step for one whose intent
    is latency (as long as all streams fit in a step)."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._groups: dict[Adaptation, _Group] = {}
        self._turns: dict[Party, int] = {}  # when a live party had its last turn
        self._turn = 0
        self._party: Party | None = None  # whose turn it is
        self._steps = self._tokens = 0  # of this turn

    def plan(self, live: Iterable[Sequence]) -> list[Chunk]:
        """The next step's chunks, at most one a sequence; empty when nothing can be computed."""
        members = list(live)
        if len(members) == 1:
            return [self._alone(members[0])]
        parties: dict[Party, list[Sequence]] = {}
        for sequence in members:
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

    def _alone(self, sequence: Sequence) -> Chunk:
        """As much of it as a step takes. Who is alone owes nobody a turn."""
        self._groups.clear()
        self._turns.clear()
        self._party = None
        return Chunk(sequence, sequence.computed, min(sequence.remaining, self.budget.step))

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
        self._burst: dict[int, int] = {}  # prompts that waited since then: their ids and shares

    def plan(self, live: list[Sequence]) -> list[Chunk]:
        streams: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in live:
            (streams if sequence.drawn and sequence.remaining == 1 else prompts).append(sequence)
        budget = self.budget
        if prompts and streams:
            self._burst |= {sequence.id: self._share(sequence) for sequence in prompts}
        else:
            self._between, self._burst = 0, {}  # nobody waits for the other
        ranked = sorted(prompts, key=self._rank)
        room = max(budget.prompts_step, min(budget.step, ranked[0].remaining)) if ranked else 0
        allowed = sum(self._burst.values()) - self._between
        if streams and prompts and allowed >= room:
            chunks = self._prefill(ranked, room)  # the streams' next tokens can wait for these
            self._between += sum(chunk.count for chunk in chunks)
            return chunks
        chunks = [Chunk(sequence, sequence.computed, 1) for sequence in streams[: budget.step]]
        if streams:
            room = min(room, max(allowed, 1), budget.step - len(chunks))
            self._between, self._burst = 0, {}
        return chunks + self._prefill(ranked, room)

    def _rank(self, sequence: Sequence) -> tuple[int, int]:
        """Prompts go in this order: tokens left, less what it waited and what its intent is given."""
        given = self._waited.get(sequence.id, 0) + HEAD_START.get(sequence.options.intent, 0)
        return sequence.remaining - given, sequence.id

    def _share(self, sequence: Sequence) -> int:
        """Tokens of a prompt that may come between two tokens of a stream."""
        match sequence.options.intent:
            case "latency":
                return self.budget.step
            case "throughput" | "battery":
                return max(1, self.budget.share // _PATIENT)
            case _:
                return self.budget.share

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
