"""How good a draft head is on answers that it has not seen: acceptance, and tokens for its time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from lichen.adapters.draft_head import DraftHead
from lichen.adapters.states import Run

DEPTH = 3  # guesses of a draft that is graded
EXTRA_TOKEN = 0.3  # of a plain step: what each drafted token is taken to cost the model, as in `control.py`
MARGIN = 1.005  # what a new head must gain over the present one
PROBES = 40  # single guesses whose time is taken


class Grade(msgspec.Struct, frozen=True, kw_only=True):
    """acceptance: share of guesses that were right by position, given those before. accepted: tokens of a
    draft of DEPTH. guess_s: median time of a guess. value: tokens a second that drafts of the best length
    up to DEPTH would give, 1 / step_s without drafts. drafts: how many were graded."""

    acceptance: tuple[float, ...]
    accepted: float
    guess_s: float
    value: float
    drafts: int

    def better_than(self, other: Grade | None) -> bool:
        """Whether it is worth a swap."""
        return other is None or self.value > MARGIN * other.value


def grade(head: DraftHead, runs: Sequence[Run], *, step_s: float) -> Grade | None:
    """Draft at every place of these runs, as serving would; None where there is no place.

    step_s: seconds of a plain step of the model.
    """
    tried, right = np.zeros(DEPTH), np.zeros(DEPTH)
    drafts = 0
    for run in runs:
        places = len(run) - 1  # the draft after tokens[i + 1], for which tokens[i + 2] is known
        if places < 1:
            continue
        drafts += places
        z = head.begin(run.states[:places].astype(np.float32))
        rows = head.rows(run.tokens[1 : places + 1])
        alive = np.ones(places, bool)
        for position in range(DEPTH):
            known = places - position
            if known < 1:
                break
            z, rows, alive = head.advance(z[:known], rows[:known]), rows[:known], alive[:known]
            rows = head.logits(z).argmax(axis=-1)
            tried[position] += alive.sum()
            alive = alive & (head.words[rows] == run.tokens[position + 2 : position + 2 + known])
            right[position] += alive.sum()
    if not drafts:
        return None
    acceptance = right / np.maximum(tried, 1)
    lengths = np.concatenate([[0.0], np.cumsum(np.cumprod(acceptance))])
    guess_s = _guess_seconds(head, runs)
    extra = np.arange(DEPTH + 1)
    rates = (1 + lengths) / (step_s * (1 + EXTRA_TOKEN * extra) + guess_s * extra)
    return Grade(
        acceptance=tuple(round(float(share), 4) for share in acceptance),
        accepted=float(lengths[-1]),
        guess_s=guess_s,
        value=float(rates.max()),
        drafts=drafts,
    )


def _guess_seconds(head: DraftHead, runs: Sequence[Run]) -> float:
    run = max(runs, key=len)
    state, token = run.states[0].astype(np.float32), int(run.tokens[1])
    times = []
    for _ in range(PROBES):
        started = time.perf_counter()
        head.guess(state, token, 1, 0.0)
        times.append(time.perf_counter() - started)
    return float(np.median(times))
