"""How much to draft in a step: measured costs of wide steps, learned acceptance, and a purse.

Without drafts, n sequences get n tokens. llama.cpp computes a step in micro-batches
(`batch.micro_batches`): as many tokens of each sequence as all of a run of neighbouring slots have, then what
some of them have more. So where all sequences of a run of m draft k tokens, that is one micro-batch of
m(1 + k), and where only some do, each draft is a micro-batch of its own, which reads all weights again: with
sixteen sequences hardly ever worth it. The controller knows what micro-batches cost (`costs.py`), learns how
often the i-th token of a draft is right for each kind of draft and each sequence (`Acceptance`), and takes
the lengths that yield most tokens a second, 0 among them.

Estimates are optimistic, which is what makes it explore; the `Purse` bounds what that may cost. It earns a
share of the time that plain steps take and whatever drafts gain, it pays for what they lose, and a bet that
it could not pay is not made. So whatever drafters, machine and neighbours do, the loss stays within the
income, up to the error of the measured cost of plain steps.

Pure: no clock, no thread, no llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lichen.runtime.speculation.costs import StepCosts
from lichen.runtime.speculation.drafter import MAX_DRAFT

GROWTH = 2  # no micro-batch is wider than so many times the widest that was measured, plus one
MARGIN = 1.02  # a step with drafts must promise at least so much more than a plain one
CROWD = 0.02  # and so much more for each further sequence: what many drafts cost together is less certain
STRETCH = 2.0  # and take at most so many plain steps where a neighbour without a draft waits for it
INCOME = 0.008  # of a plain step that the purse earns with each step
LOAN = 3.0  # plain steps that it begins with
FULL = 12.0  # plain steps that it holds at most
REFRESH = 256  # steps after which a plain one is due, so that there is something to compare with
KEEP = 0.96  # of what is known of a kind, at each new draft: about the last 25 count
HALF_LIFE = 300.0  # steps after which half of it is forgotten without one
BELIEF = 3.0  # drafts that a kind's record counts for in a sequence that has none
SPREAD = 1.0  # standard deviations of optimism
ROUNDS = 3  # in which the best rate of a step is found

Runs = Sequence[int]  # sizes of the groups of neighbouring slots of a step's sequences, in their order


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


@dataclass(slots=True, frozen=True)
class _Pick:
    """Drafts that may be added to a step together. lengths: sequence -> tokens."""

    gain: float  # tokens to expect
    seconds: float
    lengths: dict[int, int]

    @property
    def drafted(self) -> int:
        return sum(self.lengths.values())


class Controller:
    """See the module. runs: of the sequences that get a token in the step anyway."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.purse = Purse()
        self._kinds: dict[str, Acceptance] = {}

    def acceptance(self, kind: str) -> Acceptance:
        """The record of a kind of drafts, over all sequences."""
        return self._kinds.setdefault(kind, Acceptance())

    def allowance(self, runs: Runs, room: int) -> int:
        """Tokens of one sequence, at most `room`, beyond which drafts cannot pay although every one were
        right; 0: propose nothing."""
        costs, n = self.costs, sum(runs)
        if n <= 0 or any(costs.age(run) > REFRESH for run in set(runs)):
            return 0
        plain, most = costs.total(runs), 0
        spare = self.purse.balance * plain
        if spare <= 0:
            return 0
        for k in range(1, min(room, MAX_DRAFT) + 1):
            options = [(k, self._added(run, k)) for run in set(runs) if run == 1]
            if n > 1:
                options.append((k, self._seconds(k)))  # one sequence of a run
                if n * k <= room:
                    options.append((n * k, sum(self._added(run, k) for run in runs)))
            payable = [(tokens, seconds) for tokens, seconds in options if seconds <= spare]
            if not payable:
                break
            if any((n + tokens) * plain >= _margin(n) * n * (plain + seconds) for tokens, seconds in payable):
                most = k
        return most

    def lengths(self, runs: Runs, offers: Sequence[Offer], room: int) -> list[int]:
        """How much of each offer to compute: what yields most tokens a second and can be paid."""
        taken = [0] * len(offers)
        plain, n = self.costs.total(runs), sum(runs)
        if not plain:
            return taken
        sums = [list(accumulate(offer.chances)) for offer in offers]  # tokens to expect by length
        chosen: list[_Pick] = []
        best = _margin(n) * n / plain
        rate = n / plain
        for _ in range(ROUNDS):  # what is worth its time at this rate makes a better one
            picks = self._affordable(self._worth(runs, sums, rate), plain, n, room)
            new = (n + sum(p.gain for p in picks)) / (plain + sum(p.seconds for p in picks))
            if new > best:
                best, chosen = new, picks
            if new <= rate * (1.0 + 1e-9):
                break
            rate = new
        for pick in chosen:
            for which, length in pick.lengths.items():
                taken[which] = length
        return taken

    def _worth(self, runs: Runs, sums: Sequence[Sequence[float]], rate: float) -> list[_Pick]:
        """Of each run, all drafts in one micro-batch or some in micro-batches of their own: whichever yields
        most tokens beyond `rate`."""
        plain, found, at = self.costs.total(runs), [], 0
        alone = sum(runs) == 1
        spare = self.purse.balance * plain
        strict = min(spare, (STRETCH - 1.0) * plain)
        for run in runs:
            members = range(at, at + run)
            at += run
            deepest = min(len(sums[which]) for which in members)
            limit = spare if alone or run == sum(runs) else strict
            options = [
                _Pick(sum(sums[which][k - 1] for which in members), seconds, dict.fromkeys(members, k))
                for k in range(1, deepest + 1)
                if (seconds := self._added(run, k)) <= limit
            ]
            together = max(options, key=lambda pick: pick.gain - rate * pick.seconds, default=None)
            some: list[_Pick] = []
            for which in members if run > 1 else ():
                options = [
                    _Pick(gain, seconds, {which: k})
                    for k, gain in enumerate(sums[which], 1)
                    if (seconds := self._seconds(k)) <= strict and gain > rate * seconds
                ]
                if options:
                    some.append(max(options, key=lambda pick: pick.gain - rate * pick.seconds))
            value = sum(pick.gain - rate * pick.seconds for pick in some)
            if together is not None and together.gain - rate * together.seconds > max(value, 0.0):
                found.append(together)
            else:
                found += some
        return found

    def _affordable(self, picks: list[_Pick], plain: float, n: int, room: int) -> list[_Pick]:
        """Those of them, the best ones first, that the purse can pay, that there is room for, and that
        sequences without a draft can wait for."""
        spare = self.purse.balance * plain
        if sum(len(pick.lengths) for pick in picks) < n:
            spare = min(spare, (STRETCH - 1.0) * plain)
        chosen = []
        for pick in sorted(picks, key=lambda pick: -pick.gain / max(pick.seconds, 1e-9)):
            if pick.seconds <= spare and pick.drafted <= room:
                chosen.append(pick)
                spare -= pick.seconds
                room -= pick.drafted
        return chosen

    def length_at_cost(
        self, runs: Runs, run: int, chances: Sequence[float], token_s: float, room: int
    ) -> tuple[int, float]:
        """For a drafter that takes `token_s` for each token of a sequence in a run of `run`: the best length,
        and tokens a second with it, drafting included."""
        plain, n = self.costs.total(runs), sum(runs)
        if not plain:
            return 0, 0.0
        best, chosen, tokens = _margin(n) * n / plain, 0, float(n)
        for k, chance in enumerate(chances[: max(0, room)], 1):
            tokens += chance
            more = self._alone(run, k)
            if more + k * token_s > self.purse.balance * plain:
                break
            if tokens / (plain + more + k * token_s) > best:
                best, chosen = tokens / (plain + more + k * token_s), k
        return chosen, best

    def rate(self, runs: Runs, run: int, chances: Sequence[float]) -> float:
        """Most tokens a second that an offer of a sequence in a run of `run` promises alone."""
        plain, tokens, best = self.costs.total(runs), float(sum(runs)), 0.0
        for k, chance in enumerate(chances, 1):
            tokens += chance
            best = max(best, tokens / max(plain + self._alone(run, k), 1e-9))
        return best

    def stepped(
        self, runs: Runs, widths: Sequence[int], tokens: int, compute_s: float, whole_s: float
    ) -> None:
        """A step without prompts is over: micro-batches of `widths` tokens, `tokens` new ones; whole_s
        includes drafting."""
        plain, n = self.costs.total(runs), sum(runs)
        drafted = sum(widths) > n
        self.costs.observe(widths, compute_s, plain=not drafted)
        if drafted and plain:
            self.purse.settle(plain, tokens, n, whole_s)
        else:
            self.purse.earn((whole_s - compute_s) / plain if plain else 0.0)

    def _seconds(self, width: int) -> float:
        """Seconds of a micro-batch; infinite for one that is far wider than any that was measured."""
        widest = self.costs.widest
        return self.costs.seconds(width) if width <= GROWTH * widest + 1 else math.inf

    def _added(self, run: int, k: int) -> float:
        """Seconds that it takes longer if all sequences of a run draft k tokens."""
        return self._seconds(run * (1 + k)) - self.costs.seconds(run)

    def _alone(self, run: int, k: int) -> float:
        """Seconds that one sequence's draft adds at best."""
        together = self._added(run, k) / run
        return together if run == 1 else min(together, self._seconds(k))


def _margin(sequences: int) -> float:
    return MARGIN + CROWD * (sequences - 1)
