"""A step of the engine without the engine: sequences whose answers are known, on a machine whose costs are.

Real scheduler, real `Speculation`, real `verify`; only the clock and the tokens are made up.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from unittest.mock import Mock

from lichen.runtime.batch import micro_batches, runs_of
from lichen.runtime.counters import Counters
from lichen.runtime.generation import Mailbox
from lichen.runtime.scheduler import Budget, Scheduler
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.speculation.drafter import NOTHING, Draft, Drafter
from lichen.runtime.speculation.plan import Speculation
from lichen.runtime.speculation.verify import verify

Curve = Callable[[int], float]  # plain steps by tokens in the step
PLAIN_S = 0.01
WRONG = 10**6  # in no answer


def through(*points: tuple[int, float]) -> Curve:
    """Straight lines through (tokens, plain steps), and on beyond the last."""

    def cost(width: int) -> float:
        for (left, low), (right, high) in itertools.pairwise(points):
            if width <= right or (right, high) == points[-1]:
                return low + (width - left) * (high - low) / (right - left)
        raise AssertionError

    return cost


CURVES: dict[str, Curve] = {
    "bound by arithmetic": through((1, 1.0), (4, 2.6), (8, 4.6), (16, 8.3), (48, 24.0)),
    "bound by memory": through((1, 1.0), (8, 1.0), (16, 1.5), (48, 3.5)),
    "in steps of four": lambda width: 1.0 + 0.9 * ((width - 1) // 4),
    "no gain at all": float,
}


class Oracle:
    """Knows the answers, and guesses each token right with a probability that may change over time."""

    name = "oracle"

    def __init__(self, right: Callable[[Sequence], float], seed: int = 1, token_s: float = 0.0) -> None:
        self._right = right
        self._chance = random.Random(seed)
        self._token_s = token_s
        self.proposed = 0

    @property
    def token_s(self) -> float:
        return self._token_s

    def begin(self, sequence: Sequence) -> None: ...

    def end(self, sequence: Sequence) -> None: ...

    def close(self) -> None: ...

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None: ...

    def propose(self, sequence: Sequence, k: int) -> Draft:
        self.proposed += 1
        if k <= 0:
            return NOTHING
        right = self._right(sequence)
        ahead = range(len(sequence.tokens), len(sequence.tokens) + k)
        return Draft([at if self._chance.random() < right else WRONG for at in ahead], self.name)


def lying(_: Sequence) -> float:
    return 0.0


def copying(_: Sequence) -> float:
    return 1.0


def play(
    curve: Curve,
    drafters: Items[Drafter],
    *,
    sequences: int = 1,
    tokens: int | Items[int] = 1000,
    noise: float = 0.05,
    seed: int = 1,
) -> tuple[float, Counters]:
    """Time of plain decoding over time with these drafters (above 1 is faster), and what was counted.

    tokens: of each answer.
    """
    chance = random.Random(seed)
    ends = [tokens] * sequences if isinstance(tokens, int) else tokens
    room = sequences + 32
    speculation = Speculation(drafters, width=256, outputs=room, context=1 << 20)
    scheduler = Scheduler(Budget(step=256, prompts_step=64, share=64))
    counters = Counters()
    live = [
        Sequence(prompt=[0], options=SamplingOptions(max_tokens=end), mailbox=Mock(spec=Mailbox))
        for end in ends
    ]
    for slot, sequence in enumerate(live):
        sequence.slot = slot
        sequence.tokens.append(1)  # the prompt is over
        sequence.computed = 1
        speculation.begin(sequence)
    spent = plain = 0.0
    while live:
        chunks = speculation.extend(sorted(scheduler.plan(live), key=lambda chunk: chunk.sequence.slot or 0))
        speculation._drafting_s = 0.0  # real time has no place among made-up times
        slots = [chunk.sequence.slot or 0 for chunk in chunks]
        widths = micro_batches(slots, [chunk.count + len(chunk.draft) for chunk in chunks])
        seconds = PLAIN_S * sum(map(curve, widths)) * chance.uniform(1 - noise, 1 + noise)
        spent += seconds + sum(drafter.token_s * len(chunk.draft) for drafter in drafters for chunk in chunks)
        drawn = 0
        for chunk in chunks:
            sequence = chunk.sequence
            base, end = len(sequence.tokens), sequence.options.max_tokens or 0

            def draw(_: int, sequence: Sequence = sequence, end: int = end) -> int | None:
                sequence.tokens.append(len(sequence.tokens))  # the answer counts its own positions
                return sequence.tokens[-1] if sequence.drawn < end else None

            accepted = verify(chunk.draft, draw)
            if sequence.drawn >= end:
                speculation.end(sequence)
                live.remove(sequence)
            if chunk.draft:
                speculation.judge(chunk, accepted, counters)
            sequence.computed = len(sequence.tokens) - 1
            drawn += len(sequence.tokens) - base
        plain += drawn * PLAIN_S * sum(map(curve, runs_of(slots))) / len(chunks)
        speculation.stepped(drawn, seconds)
    return plain / spent, counters


def best_possible(curve: Curve, *, drafted: int = 16) -> float:
    """How much faster one sequence would be if every draft were right and every length chosen best."""
    return max((1 + k) / curve(1 + k) for k in range(drafted + 1))
