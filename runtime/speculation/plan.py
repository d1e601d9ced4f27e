"""Speculation as the engine sees it: drafts for a step's chunks, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lichen.runtime.batch import micro_batches, runs_of, slot_of
from lichen.runtime.counters import Counters
from lichen.runtime.scheduler import Chunk
from lichen.runtime.sequence import Sequence
from lichen.runtime.speculation.control import Acceptance, Controller, Offer
from lichen.runtime.speculation.drafter import MAX_DRAFT, NOTHING, Draft, Drafter, StateReader
from lichen.runtime.speculation.history import DraftHistory

if TYPE_CHECKING:
    from lichen.runtime.native import Context
    from lichen.runtime.speculation.learning import HeadLearning


@dataclass(slots=True)
class _Live:
    """What is known of one sequence: acceptance by kind of draft, and this step's draft."""

    records: dict[str, Acceptance] = field(default_factory=dict)
    drafter: Drafter | None = None
    draft: Draft = NOTHING


@dataclass(slots=True, frozen=True)
class _Step:
    """A step that only continues answers, so that its time tells what tokens cost. runs: sizes of the groups
    of neighbouring slots; widths: tokens of its micro-batches, which without drafts are the same."""

    runs: Items[int]
    widths: Items[int]


class Speculation:
    """Chooses drafter and length for each sequence at each step; without drafters it does nothing.

    width: tokens that the context computes in a step. outputs: of them with logits. readers: who looks at
    the states of every sequence.
    """

    def __init__(
        self,
        drafters: Items[Drafter] = (),
        *,
        width: int,
        outputs: int,
        context: int,
        readers: Items[StateReader] = (),
    ) -> None:
        self.drafters = list(drafters)
        self.readers = list(readers)
        self.learning: HeadLearning | None = None
        self.controller = Controller()
        self.history = DraftHistory()
        self._width, self._outputs, self._context = width, outputs, context
        self._live: dict[Sequence, _Live] = {}
        self._step: _Step | None = None  # the one that is planned
        self._drafting_s = 0.0  # of it

    @classmethod
    def off(cls) -> Speculation:
        """One that never drafts."""
        return cls(width=0, outputs=0, context=0)

    def begin(self, sequence: Sequence) -> None:
        """A sequence got its slot. One that is deterministic or wants no drafts gets none."""
        for reader in self.readers:
            reader.begin(sequence)
        options = sequence.options
        if self.drafters and options.speculation and not options.deterministic:
            self._live[sequence] = _Live()
            for drafter in self.drafters:
                drafter.begin(sequence)

    def end(self, sequence: Sequence) -> None:
        """A sequence leaves its slot; idempotent."""
        for reader in self.readers:
            reader.end(sequence)
        if self._live.pop(sequence, None) is not None:
            for drafter in self.drafters:
                drafter.end(sequence)

    def stop(self) -> None:
        """Draft no more: the context cannot take tokens back."""
        for sequence in list(self._live):
            self.end(sequence)
        self.close()
        self.drafters, self.readers = [], []

    def close(self) -> None:
        """Write what drafters remember and free what they hold; idempotent."""
        for drafter in self.drafters:
            drafter.close()
        for reader in self.readers:
            reader.close()

    def read(self, sequence: Sequence, context: Context, index: int) -> None:
        """The token after a sequence's tokens is about to be drawn from batch entry `index`."""
        if self.readers and context.has_states:
            for reader in self.readers:
                reader.read(sequence, context, index)

    def extend(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of a step, in the order of their slots, with drafts behind those that are worth one.
        Steps with prompts get none."""
        self._step, self._drafting_s = None, 0.0
        if not self.drafters or not _only_streams(chunks):
            return chunks
        slots = [slot_of(chunk.sequence) for chunk in chunks]
        runs = runs_of(slots)
        self._step = _Step(runs, runs)
        room = min(self._width, self._outputs) - len(chunks)
        deepest = self.controller.allowance(runs, room) if self._live else 0
        if deepest <= 0:
            return chunks
        started = time.perf_counter()
        lives = [self._live.get(chunk.sequence) for chunk in chunks]
        offers = []
        members = [run for run in runs for _ in range(run)]  # of each chunk, the size of its run
        for chunk, live, run in zip(chunks, lives, members, strict=True):
            if live is not None:
                self._choose(chunk.sequence, live, runs, run, deepest)
            offers.append(Offer(self._chances(live, live.draft) if live is not None else ()))
        lengths = self.controller.lengths(runs, offers, room)
        if any(lengths):
            self._step = _Step(runs, micro_batches(slots, [1 + length for length in lengths]))
        self._drafting_s = time.perf_counter() - started
        return [
            replace(chunk, draft=live.draft.tokens[:length]) if live is not None and length else chunk
            for chunk, live, length in zip(chunks, lives, lengths, strict=True)
        ]

    def judge(self, chunk: Chunk, accepted: int, counters: Counters) -> None:
        """The first `accepted` tokens of a chunk's draft were right."""
        sequence, drafted = chunk.sequence, len(chunk.draft)
        counters.drafts += 1
        counters.draft_tokens += drafted
        counters.draft_accepted += accepted
        self.history.count(drafted, accepted)
        live = self._live.get(sequence)
        if live is None or live.drafter is None:
            return  # the answer has ended, which says nothing about the rest of its draft
        live.drafter.observe(sequence, live.draft, accepted)
        tested = min(accepted + 1, drafted)
        step = self.controller.costs.step
        self._record(live, live.draft.kind).observe(tested, accepted, step)
        self.controller.acceptance(live.draft.kind).observe(tested, accepted, step)

    def stepped(self, tokens: int, seconds: float) -> None:
        """The step that was planned is over: `tokens` were drawn in it, and it took so long, drafting
        included."""
        if self._step is not None:
            runs, widths = self._step.runs, self._step.widths
            self.controller.stepped(runs, widths, tokens, seconds - self._drafting_s, seconds)

    def _choose(self, sequence: Sequence, live: _Live, runs: Items[int], run: int, room: int) -> None:
        """This sequence's draft for the step, from the drafter that promises most."""
        options = sequence.options
        left = self._context - len(sequence.tokens) - 1
        if options.max_tokens is not None:
            left = min(left, options.max_tokens - sequence.drawn - 1)
        most = min(MAX_DRAFT, left, room)
        live.draft, live.drafter, promised = NOTHING, None, 0.0
        for drafter in self.drafters if most > 0 else ():
            length = most
            if drafter.token_s:
                chances = self._record(live, drafter.name).chances(most, self.controller.costs.step)
                length, rate = self.controller.length_at_cost(runs, run, chances, drafter.token_s, most)
                if not length or rate <= promised:
                    continue
            draft = drafter.propose(sequence, length)
            rate = self.controller.rate(runs, run, self._chances(live, draft))
            if draft.tokens and rate > promised:
                live.draft, live.drafter, promised = draft, drafter, rate

    def _chances(self, live: _Live, draft: Draft) -> list[float]:
        if not draft.tokens:
            return []
        return self._record(live, draft.kind).chances(len(draft.tokens), self.controller.costs.step)

    def _record(self, live: _Live, kind: str) -> Acceptance:
        record = live.records.get(kind)
        if record is None:
            record = live.records[kind] = Acceptance(self.controller.acceptance(kind))
        return record


def _only_streams(chunks: list[Chunk]) -> bool:
    """Whether a step only continues answers, so that its time tells what tokens cost."""
    return bool(chunks) and all(chunk.count == 1 and chunk.sequence.drawn for chunk in chunks)
