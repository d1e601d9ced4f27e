"""How much to draft in a step: measured costs of wide steps, learned acceptance, and a purse.

A step that computes w tokens takes c(w) seconds. Of n sequences without drafts it yields n tokens; with
drafts of which the i-th is right with probability S_i, n + sum(S_i) tokens in c(n + drafted). The controller
takes the lengths that yield most tokens a second, 0 among them. What it needs is learned as it goes: c from
the engine's own steps (`StepCosts`), S by position for each kind of draft and each sequence (`Acceptance`).

Estimates are optimistic, which is what makes it explore; the `Purse` bounds what that may cost. It earns a
share of the time that plain steps take and whatever drafts gain, it pays for what they lose, and a bet that
it could not pay is not made. So whatever drafters, machine and neighbours do, the loss stays within the
income, up to the error of the measured cost of plain steps.

Pure: no clock, no thread, no llama.cpp.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from lichen.runtime.speculation.drafter import MAX_DRAFT

EXTRA_TOKEN = 0.3  # of a plain step: what a further token is taken to cost before any step says so
GROWTH = 2  # no step is wider than so many times the widest that was measured, plus one
MARGIN = 1.02  # a step with drafts must promise at least so much more than a plain one
STRETCH = 2.0  # and take at most so many plain steps where a neighbour without a draft waits for it
INCOME = 0.01  # of a plain step that the purse earns with each step
LOAN = 3.0  # plain steps that it begins with
FULL = 12.0  # plain steps that it holds at most
REFRESH = 256  # steps after which a plain one is due, so that there is something to compare with
FRESH = 32.0  # steps for which a measured cost counts as recent
BELIEVED = 1500.0  # steps after which it is mostly forgotten, if that makes wider steps look cheaper
SMOOTHING = 0.2  # share of a new measurement
KEEP = 0.96  # of what is known of a kind, at each new draft: about the last 25 count
HALF_LIFE = 300.0  # steps after which half of it is forgotten without one
BELIEF = 3.0  # drafts that a kind's record counts for in a sequence that has none
SPREAD = 1.0  # standard deviations of optimism


class StepCosts:
    """Seconds of a step by the number of tokens that it computes, between and beyond what was measured.

    A measured change is put down to the width of that step as far as the other widths were measured
    recently, and to the whole machine (heat, other programs) as far as they were not.
    """

    def __init__(self) -> None:
        self._logs: dict[int, float] = {}  # width -> log of seconds
        self._seen: dict[int, int] = {}  # width -> step
        self._widths: list[int] = []  # ascending
        self._curve: list[float] = []  # seconds of those, never falling
        self.step = 0

    def observe(self, width: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self.step += 1
        known = self._logs.get(width)
        taken = math.log(max(seconds, 1e-9))
        if known is None:
            self._logs[width] = taken
            self._widths = sorted(self._logs)
        else:
            share = max(SMOOTHING, 1.0 - self._trust(width))
            change = share * max(-0.7, min(0.7, taken - known))  # one hiccup is not a trend
            for other, value in self._logs.items():
                recent = 0.0
                if other != width:
                    recent = math.exp((self._seen[other] - self.step) / FRESH)
                self._logs[other] = value + change * (1.0 - recent)
        self._seen[width] = self.step
        high = 0.0
        self._curve = [high := max(high, self._believed(one, width)) for one in self._widths]

    def _trust(self, width: int) -> float:
        return math.exp((self._seen[width] - self.step) / BELIEVED)

    def _believed(self, width: int, now: int) -> float:
        """Seconds of a width; the longer ago it was measured, the more it is taken from the width `now`."""
        trust, value = self._trust(width), self._logs[width]
        guessed = self._logs[now] + math.log(_shape(width) / _shape(now))
        return math.exp(trust * value + (1.0 - trust) * min(value, guessed))

    def age(self, width: int) -> float:
        """Steps since this width was measured; infinite if it never was."""
        return self.step - self._seen[width] if width in self._seen else math.inf

    @property
    def widest(self) -> int:
        """The widest step that was measured; 0 for none."""
        return self._widths[-1] if self._widths else 0

    def seconds(self, width: int) -> float:
        """Expected seconds; 0 before anything was measured."""
        widths, curve = self._widths, self._curve
        if not widths:
            return 0.0
        at = bisect_left(widths, width)
        if at < len(widths) and widths[at] == width:
            return curve[at]
        if at == 0:
            return curve[0] * _shape(width) / _shape(widths[0])
        if at == len(widths):
            return curve[-1] * _shape(width) / _shape(widths[-1])
        share = (width - widths[at - 1]) / (widths[at] - widths[at - 1])
        return curve[at - 1] + share * (curve[at] - curve[at - 1])


def _shape(width: int) -> float:
    return 1.0 + EXTRA_TOKEN * (width - 1)


class Acceptance:
    """How often drafts were right, by position, given that all positions before were: a Beta posterior each,
    with forgetting. before: the record of the same kind elsewhere, from which this one starts."""

    def __init__(self, before: Acceptance | None = None) -> None:
        self._before = before
        self._hits = [0.0] * MAX_DRAFT
        self._tries = [0.0] * MAX_DRAFT
        self._step = 0  # of the newest draft

    def observe(self, tested: int, accepted: int, step: int) -> None:
        """Of the first `tested` positions `accepted` were right: the last one tested was wrong, or none."""
        faded = self._faded(step)
        self._step = step
        for position in range(MAX_DRAFT):
            keep = faded * KEEP if position < tested else faded
            self._hits[position] = self._hits[position] * keep + (position < accepted)
            self._tries[position] = self._tries[position] * keep + (position < tested)

    def chances(self, k: int, step: int) -> list[float]:
        """[k] optimistic probabilities that the first i + 1 tokens of a draft are all right."""
        chance, mean = 1.0, 0.5
        out = []
        for position in range(k):
            mean, tries = self._posterior(position, mean, step)
            chance *= min(1.0, mean + SPREAD * math.sqrt(mean * (1.0 - mean) / (tries + 1.0)))
            out.append(chance)
        return out

    def _posterior(self, position: int, mean: float, step: int) -> tuple[float, float]:
        """Mean and weight of evidence; `mean` is that of the position before, the first guess here."""
        belief = 1.0
        if self._before is not None:
            mean, tries = self._before._posterior(position, mean, step)
            belief = min(BELIEF, tries)
        faded = self._faded(step)
        tries = self._tries[position] * faded + belief
        return (self._hits[position] * faded + belief * mean) / tries, tries

    def _faded(self, step: int) -> float:
        return math.exp2((self._step - step) / HALF_LIFE)


@dataclass(slots=True, frozen=True)
class Offer:
    """[k] chances of one sequence's draft, never rising."""

    chances: Sequence[float]


class Purse:
    """What may be lost, in plain steps. Never above FULL; bets are refused before it is empty."""

    def __init__(self) -> None:
        self.balance = LOAN

    def settle(self, plain_s: float, tokens: float, plain_tokens: int, seconds: float) -> None:
        """A step yielded `tokens` in `seconds`, where a plain one yields `plain_tokens` in `plain_s`."""
        gain = tokens / plain_tokens - seconds / plain_s
        self.balance = min(FULL, self.balance + gain + INCOME)

    def earn(self, cost: float) -> None:
        """A plain step is over; looking for drafts cost so many plain steps."""
        self.balance = min(FULL, self.balance + INCOME - cost)


class Controller:
    """See the module. n is always the number of sequences that get a token in the step anyway."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.purse = Purse()
        self._kinds: dict[str, Acceptance] = {}

    def acceptance(self, kind: str) -> Acceptance:
        """The record of a kind of drafts, over all sequences."""
        return self._kinds.setdefault(kind, Acceptance())

    def allowance(self, n: int, room: int) -> int:
        """Tokens, at most `room`, beyond which drafts cannot pay although every one were right; 0: propose
        nothing."""
        costs = self.costs
        if n <= 0 or costs.age(n) > REFRESH:
            return 0
        plain, most = costs.seconds(n), 0
        for extra in range(1, min(room, self._widest(n) - n) + 1):
            seconds = costs.seconds(n + extra)
            if seconds - plain > self.purse.balance * plain:
                break
            if (n + extra) * plain >= MARGIN * n * seconds:
                most = extra
        return most

    def lengths(self, n: int, offers: Sequence[Offer], room: int) -> list[int]:
        """How much of each offer to compute: what yields most tokens a second and can be paid."""
        taken = [0] * len(offers)
        plain = self.costs.seconds(n)
        if not plain:
            return taken
        order = sorted(
            (
                (chance, -place, which)
                for which, offer in enumerate(offers)
                for place, chance in enumerate(offer.chances)
            ),
            reverse=True,
        )
        best, chosen = MARGIN * n / plain, 0
        tokens, drafting = float(n), [False] * len(offers)
        for extra, (chance, _, which) in enumerate(order[: max(0, min(room, self._widest(n) - n))], 1):
            tokens += chance
            drafting[which] = True
            seconds = self.costs.seconds(n + extra)
            if seconds - plain > self.purse.balance * plain:
                break
            if sum(drafting) < n and seconds > STRETCH * plain:
                continue
            if tokens / seconds > best:
                best, chosen = tokens / seconds, extra
        for _, _, which in order[:chosen]:
            taken[which] += 1
        return taken

    def length_at_cost(
        self, n: int, chances: Sequence[float], token_s: float, room: int
    ) -> tuple[int, float]:
        """For a drafter that takes `token_s` for each token: the best length, and tokens a second with it,
        drafting included."""
        plain = self.costs.seconds(n)
        if not plain:
            return 0, 0.0
        best, chosen, tokens = MARGIN * n / plain, 0, float(n)
        for extra, chance in enumerate(chances[: max(0, min(room, self._widest(n) - n))], 1):
            tokens += chance
            seconds = self.costs.seconds(n + extra) + extra * token_s
            if seconds - plain > self.purse.balance * plain:
                break
            if tokens / seconds > best:
                best, chosen = tokens / seconds, extra
        return chosen, best

    def rate(self, n: int, chances: Sequence[float]) -> float:
        """Most tokens a second that an offer promises alone."""
        tokens, best = float(n), 0.0
        for extra, chance in enumerate(chances, 1):
            tokens += chance
            best = max(best, tokens / max(self.costs.seconds(n + extra), 1e-9))
        return best

    def stepped(self, n: int, drafted: int, tokens: int, compute_s: float, whole_s: float) -> None:
        """A step without prompts is over: n sequences, `tokens` new tokens; whole_s includes drafting."""
        plain = self.costs.seconds(n)
        self.costs.observe(n + drafted, compute_s)
        if drafted and plain:
            self.purse.settle(plain, tokens, n, whole_s)
        else:
            self.purse.earn((whole_s - compute_s) / plain if plain else 0.0)

    def _widest(self, n: int) -> int:
        return max(GROWTH * self.costs.widest + 1, n + 1)
