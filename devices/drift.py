"""What a running system does beside what its plan said, and when that is reason enough for another plan.

Everything here is arithmetic over counters that somebody else read. A window is a stretch of some seconds;
the load that it shows is planned for anew, and a better plan is taken up only when it was better by a margin
several windows in a row, and not soon after the last change: a change costs, and noise has no direction.
"""

from __future__ import annotations

import msgspec

from lichen.devices.cost import Prediction
from lichen.devices.intent import Objectives
from lichen.devices.load import MOST_TOKENS, MOST_USERS, Load
from lichen.devices.pace import Plan

LEAST_ANSWERS = 3  # in a window that tells of a load
GAIN = 1.15  # by how much the intent's cost must fall
TIMES = 3  # windows in a row
REST_S = 60.0  # after a change
MOST_SLOW = 4.0  # times slower than measured that is taken for true


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted in a stretch of time, as differences of `runtime.counters.Counters`.

    busy: seconds in which any request was under way. active: requests under way then, on average.
    """

    busy: float
    active: float
    requests: int
    completed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_tokens: int
    ttft_s: float

    @property
    def rate(self) -> float:
        """Tokens a second while anything was to do."""
        return self.completion_tokens / self.busy if self.busy else 0.0

    @property
    def ttft(self) -> float | None:
        """Mean seconds to the first token; None where there was none."""
        return self.ttft_s / self.first_tokens if self.first_tokens else None

    def load(self) -> Load | None:
        """The load that it shows, as users who ask without a pause; None where too little was seen."""
        if self.completed < LEAST_ANSWERS or not self.requests or not self.busy:
            return None
        prompt = min(MOST_TOKENS, max(1, round(self.prompt_tokens / self.requests)))
        return Load(
            users=min(MOST_USERS, max(1, round(self.active))),
            prompt=prompt,
            answer=min(MOST_TOKENS, max(1, round(self.completion_tokens / self.completed))),
            shared=min(prompt, round(self.cached_tokens / self.requests)),
        )


def slowdown(predicted: Prediction, window: Window) -> float:
    """How many times slower than its prediction a plan runs: another program, heat. At least 1."""
    return min(MOST_SLOW, max(1.0, predicted.rate / window.rate)) if window.rate else 1.0


def stricter(objectives: Objectives, slow: float, memory: int | None) -> Objectives:
    """Objectives for predictions that are `slow` times too good. memory: bytes that there are, if fewer."""
    bytes_left = [limit for limit in (objectives.memory, memory) if limit is not None]
    return msgspec.structs.replace(
        objectives,
        ttft=None if objectives.ttft is None else objectives.ttft / slow,
        itl=None if objectives.itl is None else objectives.itl / slow,
        rate=None if objectives.rate is None else objectives.rate * slow,
        memory=min(bytes_left) if bytes_left else None,
    )


class Hysteresis:
    """Lets a change through when it is worth it. clock: seconds, as `now` in `ready`."""

    def __init__(self, *, gain: float = GAIN, times: int = TIMES, rest_s: float = REST_S) -> None:
        self._gain, self._times, self._rest_s = gain, times, rest_s
        self._wanted: Plan | None = None
        self._seen = 0
        self._changed: float | None = None

    def ready(self, plan: Plan, before: float, after: float, now: float) -> bool:
        """Whether to change to `plan`, which would bring the intent's cost from `before` to `after`.

        before: infinite where the present plan breaks an objective.
        """
        if before < self._gain * after:
            self._wanted, self._seen = None, 0
            return False
        self._seen = self._seen + 1 if plan == self._wanted else 1
        self._wanted = plan
        rested = self._changed is None or now - self._changed >= self._rest_s
        return rested and self._seen >= self._times

    def changed(self, now: float) -> None:
        """A change was made."""
        self._changed, self._wanted, self._seen = now, None, 0
