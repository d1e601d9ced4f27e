"""When lichen learns by itself from feedback: a decision on facts and a clock that are passed in.

Nothing is read here and nothing is done. Every decision says why in one sentence, for whoever wonders.
Not covered: what is learned (`export.py`), and who gathers the facts (`runtime/initiative.py`).
"""

from __future__ import annotations

import datetime
import re

import msgspec

_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
MINUTE_S = 60.0


class Hours(msgspec.Struct, frozen=True):
    """A stretch of every day in local time, from its first minute to before its last; it may cross
    midnight, and is the whole day where both are the same."""

    first: datetime.time
    last: datetime.time

    def holds(self, now: datetime.time) -> bool:
        """Whether a time of day is within."""
        if self.first < self.last:
            return self.first <= now < self.last
        return now >= self.first or now < self.last

    def __str__(self) -> str:
        return f"{self.first:%H:%M}-{self.last:%H:%M}"


def hours_of(text: str) -> Hours:
    """Of a text such as 22:00-06:30. Raises ValueError."""
    match = _HOURS.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} are no hours such as 22:00-06:30")
    a, b, c, d = (int(part) for part in match.groups())
    return Hours(datetime.time(a, b), datetime.time(c, d))


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What must hold before it learns. after: new lessons. idle: seconds without a request. memory, disk:
    bytes that are free, and that the training may then take. hours: when it may begin; None for always."""

    after: int = 20
    idle: float = 600.0
    memory: int = 2_000_000_000
    disk: int = 2_000_000_000
    hours: Hours | None = None
    on_battery: bool = False


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """How things stand. lessons: new ones since the last learning. forgotten: whether what serves learned
    from something that was to be forgotten since. working: a job that has not ended. idle: seconds since the
    last request. plugged: None where there is no battery. memory, disk: free bytes. now: local time."""

    lessons: int
    forgotten: bool = False
    working: str | None = None
    idle: float
    plugged: bool | None = None
    memory: int
    disk: int
    now: datetime.time


class Decision(msgspec.Struct, frozen=True):
    """Whether to learn now, and why, in a sentence."""

    learn: bool
    sentence: str


def decide(rules: Rules, facts: Facts) -> Decision:
    """The first rule that does not hold decides; all of them together let it learn."""
    if facts.working is not None:
        return _no(f"The job {facts.working} has not ended.")
    if not facts.forgotten and facts.lessons < max(1, rules.after):
        return _no(
            f"There are {facts.lessons:,} new lessons of the {max(1, rules.after):,} that it waits for."
        )
    if rules.hours is not None and not rules.hours.holds(facts.now):
        return _no(
            f"It is {facts.now:%H:%M}, and it learns from {rules.hours.first:%H:%M} "
            f"to {rules.hours.last:%H:%M}."
        )
    if facts.plugged is False and not rules.on_battery:
        return _no("The machine runs on its battery.")
    if facts.idle < rules.idle:
        return _no(
            f"The last request was {facts.idle / MINUTE_S:.1f} minutes ago, "
            f"and it waits for {rules.idle / MINUTE_S:g}."
        )
    for name, free, needed in (
        ("memory", facts.memory, rules.memory),
        ("disk space", facts.disk, rules.disk),
    ):
        if free < needed:
            return _no(f"{free / 1e9:.1f} GB of {name} are free, and it may need {needed / 1e9:.1f}.")
    if facts.forgotten:
        return Decision(True, "What serves learned from something that was forgotten: it learns without it.")
    return Decision(
        True, f"There are {facts.lessons:,} new lessons and nothing stands against it: it learns."
    )


def _no(reason: str) -> Decision:
    return Decision(False, reason)
