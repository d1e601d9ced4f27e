"""What drafts can bring on this machine, for `bench.speculation`: in one process, without HTTP.

Measured: what a step costs by the tokens in it; the model's own answers, and at each of their tokens how much
of a suffix drafter's guess comes true; and a drafter that always lies, beside plain decoding. Computed from
these: the fastest way through the same answers for somebody who knows the cost curve and how reliable each
kind of draft is, but not which draft is right (`attainable`), and the same with costs of a device whose memory
is the bottleneck, where eight tokens cost what one costs.
"""

from __future__ import annotations

import argparse
import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.speculation_sides import COPYING, Work
from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.generation import Mailbox
from lichen.runtime.native import DECODE_OK, Context, ContextSize, Model
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.sequence import Sequence as Live
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.runtime.speculation.drafter import MAX_DRAFT, Draft
from lichen.runtime.speculation.suffix import SuffixDrafter

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17)
DEPTH = 256  # tokens in the cache while costs are measured
FLAT = 8  # tokens that cost what one costs, where memory is the bottleneck
ROUNDS = 5

Curve = Callable[[int], float]  # plain steps by tokens of a step


@dataclass(frozen=True, slots=True)
class Guess:
    """A draft at one place of a known answer: of its `length` tokens the first `right` come."""

    kind: str
    length: int
    right: int


class Liar:
    """Drafts what is never said, whenever it is asked."""

    name = "liar"
    token_s = 0.0

    def __init__(self, token: int) -> None:
        self._token = token

    def begin(self, sequence: Live) -> None: ...

    def end(self, sequence: Live) -> None: ...

    def close(self) -> None: ...

    def observe(self, sequence: Live, draft: Draft, accepted: int) -> None: ...

    def propose(self, sequence: Live, k: int) -> Draft:
        """As many wrong tokens as may be."""
        return Draft([self._token] * k, self.name)


async def answers_and_lies(
    path: Path, work: Work, options: argparse.Namespace, count: int
) -> tuple[dict[str, list[tuple[list[int], int]]], list[dict[str, Any]]]:
    """(Kind of work -> (tokens, how many of them are the prompt) of plain answers; what a liar made of the rate.)

    The first `count` questions of each kind, each answered plainly and with lies, in changing order.
    """
    settings = ModelOptions(
        context=options.context,
        slots=1,
        threads=options.threads,
        speculation=SpeculationOptions(drafters="suffix"),
    )
    served = ServedModel.load(path, name="model", sha256="", options=settings)
    speculation = served.engine.speculation
    speculation.drafters[:] = [Liar(served.engine.model.vocab_size - 1)]
    texts: dict[str, list[tuple[list[int], int]]] = {}
    entries = []
    try:
        for kind, bodies in work.items():
            for number, body in enumerate(bodies[:count]):
                await _answer(served, body, 1, False)
                entry: dict[str, Any] = {"work": kind}
                for lies in (False, True) if number % 2 else (True, False):
                    sequence, taken = await _answer(served, body, options.tokens, lies)
                    entry["liar" if lies else "plain"] = taken
                    if not lies:
                        texts.setdefault(kind, []).append((list(sequence.tokens), len(sequence.prompt)))
                entries.append(entry)
    finally:
        served.close()
    return texts, entries


async def _answer(
    served: ServedModel, body: Mapping[str, Any], tokens: int, drafts: bool
) -> tuple[Live, dict[str, Any]]:
    form = AnswerForm()
    if "response_format" in body:
        form = AnswerForm(schema=body["response_format"]["json_schema"]["schema"])
    wanted = SamplingOptions(temperature=0, max_tokens=tokens, speculation=drafts)
    (generation,) = await served.chat(body["messages"], wanted, form)
    await generation.text()
    assert generation.finished is not None, "the text is complete"
    timings, usage = generation.finished.timings, generation.finished.usage
    return generation.sequence, {
        "tokens": usage.completion_tokens,
        "decode_ms": round(timings.decode_s * 1e3, 3),
        "draft_n": timings.draft_n,
        "draft_n_accepted": timings.draft_n_accepted,
    }


def step_costs(path: Path, threads: int, runs: int) -> dict[int, float]:
    """Seconds of a step of one sequence by its tokens, behind `DEPTH` others: medians, widths in turn."""
    model = Model(path)
    context = Context(
        model, ContextSize(context=512, slots=1, threads=threads, batch=DEPTH, outputs=max(WIDTHS))
    )
    try:
        code = context.decode([5] * DEPTH, list(range(DEPTH)), [0] * DEPTH, [0] * (DEPTH - 1) + [1])
        assert code == DECODE_OK, "a cache of 512 tokens holds 256"
        taken: dict[int, list[float]] = {width: [] for width in WIDTHS}
        for run in range(runs + 1):
            for width in WIDTHS:
                tokens = [7 + run + at for at in range(width)]
                began = time.perf_counter()
                context.decode(tokens, list(range(DEPTH, DEPTH + width)), [0] * width, [1] * width)
                context.logits(width - 1)
                if run:  # the first of each width makes its graph
                    taken[width].append(time.perf_counter() - began)
                context.truncate(0, DEPTH)
    finally:
        context.close()
        model.close()
    return {width: statistics.median(values) for width, values in taken.items()}


def curve_of(seconds: Mapping[int, float]) -> Curve:
    """Plain steps by width, straight between what was measured and beyond it."""
    widths = sorted(seconds)

    def cost(width: int) -> float:
        at = min(max(1, bisect.bisect_left(widths, width)), len(widths) - 1)
        left, right = widths[at - 1], widths[at]
        share = (width - left) / (right - left)
        return (seconds[left] + share * (seconds[right] - seconds[left])) / seconds[1]

    return cost


def memory_bound(width: int) -> float:
    """Plain steps of a device that reads weights as long as it computes eight tokens."""
    return max(1.0, width / FLAT)


def guesses(tokens: Sequence[int], prompt: int) -> list[Guess]:
    """What a suffix drafter would guess behind each token of an answer, and how much of it comes."""
    found = []
    drafter = SuffixDrafter()
    live = Live(prompt=list(tokens[:prompt]), options=SamplingOptions(), mailbox=Mailbox())
    drafter.begin(live)
    for at in range(prompt + 1, len(tokens)):
        live.tokens[:] = tokens[:at]
        draft = drafter.propose(live, MAX_DRAFT)
        coming = tokens[at : at + len(draft.tokens)]
        right = next(
            (n for n, (a, b) in enumerate(zip(draft.tokens, coming, strict=False)) if a != b), len(coming)
        )
        found.append(Guess(draft.kind, len(coming), right))  # nothing is drafted beyond the end
    drafter.end(live)
    return found


def acceptance(answers: Sequence[Sequence[Guess]]) -> dict[str, list[float]]:
    """Kind of draft -> share of drafts whose first i + 1 tokens were right, of those that had so many."""
    kinds: dict[str, list[Guess]] = {}
    for guess in (guess for answer in answers for guess in answer if guess.length):
        kinds.setdefault(guess.kind, []).append(guess)
    return {kind: [round(share, 4) for share in _shares(found)] for kind, found in sorted(kinds.items())}


def _shares(found: Sequence[Guess]) -> list[float]:
    shares = []
    for position in range(MAX_DRAFT):
        tried = [guess for guess in found if guess.length > position]
        if not tried:
            break
        shares.append(sum(guess.right > position for guess in tried) / len(tried))
    return shares


def attainable(answers: Sequence[Sequence[Guess]], cost: Curve) -> float:
    """Speed against plain decoding, at the best length for each kind of draft known beforehand."""
    best, rate = 1.0, 1.0
    for _ in range(ROUNDS):  # lengths that are best at a rate make a better one
        lengths = _lengths(answers, cost, rate)
        rate = _speed(answers, lengths, cost)
        if rate <= best:
            break
        best = rate
    return best


def _lengths(answers: Sequence[Sequence[Guess]], cost: Curve, rate: float) -> dict[str, int]:
    values: dict[str, list[float]] = {}
    for guess in (guess for answer in answers for guess in answer if guess.length):
        row = values.setdefault(guess.kind, [0.0] * (MAX_DRAFT + 1))
        for k in range(MAX_DRAFT + 1):
            row[k] += min(guess.right, k) - rate * cost(1 + min(k, guess.length))
    return {kind: max(range(MAX_DRAFT + 1), key=row.__getitem__) for kind, row in values.items()}


def _speed(answers: Sequence[Sequence[Guess]], lengths: Mapping[str, int], cost: Curve) -> float:
    tokens, steps = 0, 0.0
    for answer in answers:
        at = 0
        while at < len(answer):
            guess = answer[at]
            length = min(lengths.get(guess.kind, 0), guess.length)
            gone = 1 + min(guess.right, length)
            steps += cost(1 + length)
            tokens += min(gone, len(answer) - at)
            at += gone
    return tokens / steps if steps else 1.0


def bound(
    texts: Mapping[str, Sequence[tuple[list[int], int]]], seconds: Mapping[int, float]
) -> dict[str, dict[str, Any]]:
    """Kind of work -> attainable speed on this machine, and computed for one that memory binds."""
    kinds = {kind: [guesses(*answer) for answer in answers] for kind, answers in texts.items()}
    sums = {"copying": COPYING, "all": tuple(kinds)}
    for name, members in sums.items():
        kinds[name] = [answer for kind in members for answer in kinds.get(kind, ())]
    found = {}
    for kind, replayed in kinds.items():
        found[kind] = {
            "attainable": round(attainable(replayed, curve_of(seconds)), 4),
            "attainable_memory_bound_computed": round(attainable(replayed, memory_bound), 4),
            "acceptance": acceptance(replayed),
        }
    return found
