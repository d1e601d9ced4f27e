"""What a step costs on this machine for this file: seconds of micro-batches by their tokens, as measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

EXTRA_TOKEN = 0.3  # of a plain step: what a further token is taken to cost before any step says so
FRESH = 32.0  # steps for which a measured cost counts as recent
SETTLED = 256.0  # plain steps ago: about where a cost of plain steps is no longer taken as known
BELIEVED = 1500.0  # steps after which it is mostly forgotten, if that makes wider steps look cheaper
SMOOTHING = 0.2  # share of a new measurement
HICCUP = 0.7  # of the logarithm: at most so much of one measurement is believed
FIRST = 3.0  # and so much of the first


class StepCosts:
    """Seconds of a micro-batch by the number of tokens that it computes, between and beyond what was
    measured; a step takes as long as its micro-batches together.

    A measured change is put down to the widths of that step as far as the other widths were measured
    recently, and to the whole machine (heat, other programs) as far as they were not. Of a step with several
    micro-batches, those are blamed most whose cost no plain step has told lately: what drafts add must not
    make plain steps look dear, which would make more drafts look cheap.
    """

    def __init__(self) -> None:
        self._logs: dict[int, float] = {}  # width -> log of seconds
        self._seen: dict[int, int] = {}  # width -> step
        self._plain: dict[int, int] = {}  # width -> the last step without drafts
        self._widths: list[int] = []  # ascending
        self._curve: list[float] = []  # seconds of those, never falling
        self.step = 0

    def observe(self, widths: Sequence[int], seconds: float, *, plain: bool = True) -> None:
        """A step of micro-batches of so many tokens took so long. plain: nothing in it was drafted."""
        self.step += 1
        seconds = max(seconds, 1e-9)
        counts = Counter(widths)
        if not self._logs:
            unit = seconds / sum(map(_shape, widths))
            self._logs = {width: math.log(unit * _shape(width)) for width in counts}
        for width in counts.keys() - self._logs.keys():
            self._logs[width] = math.log(self.seconds(width))
        known = {width: count * math.exp(self._logs[width]) for width, count in counts.items()}
        change = self._blame(known, seconds - sum(known.values()))
        for other, value in self._logs.items():
            if other not in counts:
                recent = math.exp((self._seen[other] - self.step) / FRESH)
                self._logs[other] = value + change * (1.0 - recent)
        for width in counts:
            self._seen[width] = self.step
            if plain:
                self._plain[width] = self.step
        self._widths = sorted(self._logs)
        now, high = max(counts), 0.0
        self._curve = [high := max(high, self._believed(one, now)) for one in self._widths]

    def _blame(self, known: dict[int, float], surprise: float) -> float:
        """Put seconds more than expected down to the widths; the mean change of logarithms.

        known: expected seconds of each width in the step, all its micro-batches together.
        """
        doubts = {width: taken * self._doubt(width) for width, taken in known.items()}
        whole, total, mean = sum(doubts.values()), sum(known.values()), 0.0
        for width, taken in known.items():
            seen = width in self._seen
            share = max(SMOOTHING, 1.0 - self._trust(width)) if seen else 1.0
            limit = HICCUP if seen else FIRST
            real = max(taken + surprise * doubts[width] / whole, 1e-3 * taken)
            change = share * max(-limit, min(limit, math.log(real / taken)))
            self._logs[width] += change
            mean += change * taken / total
        return mean

    def _doubt(self, width: int) -> float:
        return 1.01 - math.exp(-self.age(width) / SETTLED)

    def _trust(self, width: int) -> float:
        return math.exp((self._seen[width] - self.step) / BELIEVED)

    def _believed(self, width: int, now: int) -> float:
        """Seconds of a width; the longer ago it was measured, the more it is taken from the width `now`."""
        trust, value = self._trust(width), self._logs[width]
        guessed = self._logs[now] + math.log(_shape(width) / _shape(now))
        return math.exp(trust * value + (1.0 - trust) * min(value, guessed))

    def age(self, width: int) -> float:
        """Steps since a step without drafts told this width's cost; infinite if none did."""
        return self.step - self._plain[width] if width in self._plain else math.inf

    @property
    def widest(self) -> int:
        """The widest micro-batch that was measured; 0 for none."""
        return self._widths[-1] if self._widths else 0

    def total(self, widths: Sequence[int]) -> float:
        """Expected seconds of a step of these micro-batches; 0 before anything was measured."""
        return sum(map(self.seconds, widths))

    def seconds(self, width: int) -> float:
        """Expected seconds of one micro-batch; 0 before anything was measured."""
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

    def curve(self) -> dict[int, float]:
        """Seconds by width, of all that was measured."""
        return dict(zip(self._widths, self._curve, strict=True))


def _shape(width: int) -> float:
    return 1.0 + EXTRA_TOKEN * (width - 1)
