"""How requests go while a number of them is being answered: what their steps hold, and how long they take.

The engine computes one batch after another (`runtime/scheduler.py`), so time is the sum of batches, and what
a request waits for is in them: its prompt, its tokens, and what others have in the same batches. Three
ways to share them occur:

    apart     a prompt is short enough to go in a batch of its own between two tokens of the streams
    mixed     a longer one puts a chunk into each of several steps, beside the tokens of the streams
    together  all prompts first, then all answers side by side

llama.cpp computes a batch in passes, each of which reads all weights: as many tokens of each sequence as all
have, then what is left of each (`runtime/batch.py`). So a chunk beside streams takes two, and prompts of
which several go in one batch take more than one, too.

In the second, how many others are at their prompt is binomial, since each is so for the same part of its
time. Not covered: prompts and answers of very different lengths at once, which count by their means.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec

from lichen.devices.curves import Fingerprint
from lichen.devices.load import Load

DELIVERY_S = 0.0004  # to draw a token and bring it to a client, on cores that steps fill (docs/log.md)
ROUND_TRIP_S = 0.004  # from the end of an answer until the same user's next request is there
_UNLIKELY = 1e-4
_LATE = 0.95
_ROUNDS = 4  # of the fixed point between the time for prompts and who is at them


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model. layout: as its fingerprint names it. context: tokens a slot. batch: tokens a step.
    chunk: tokens that each waiting prompt may put between two tokens of a stream. kv_type: of the KV
    cache. draft: tokens that speculation guesses a step; 0 for none."""

    layout: str
    threads: int
    slots: int
    context: int
    batch: int = 256
    chunk: int = 64
    kv_type: str = "f16"
    draft: int = 0

    @property
    def prompts_step(self) -> int:
        """Tokens of prompts a step where several wait, as `runtime/engine.py` sets it."""
        return max(1, self.batch // 4)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. first, first_late: from having a slot to the first token, median and 95th percentile. itl:
    mean between two tokens. cycle: of a whole request. firsts: each one's of those that begin together."""

    first: float
    first_late: float
    itl: float
    cycle: float
    firsts: tuple[float, ...] = ()


def pace(fingerprint: Fingerprint, plan: Plan, load: Load, active: int) -> Pace:
    """With `active` requests being answered at once, each followed by the next. Pure; some microseconds."""
    steps = Steps(fingerprint, plan, load)
    if active == 1:
        prefill = steps.prompt(plan.batch)
        alone = _pace(load, prefill, prefill, steps.count * steps.seconds(1))
        return msgspec.structs.replace(alone, firsts=(prefill,))
    if load.together:
        return _together(steps, active)
    if max(plan.prompts_step, min(plan.batch, load.fresh)) <= plan.chunk:
        return _apart(steps, active)
    return _mixed(steps, active)


class Steps:
    """What single steps of one plan under one load take. count: steps of an answer after its first token."""

    def __init__(self, fingerprint: Fingerprint, plan: Plan, load: Load) -> None:
        self._fingerprint = fingerprint
        self.plan = plan
        self.load = load
        right = load.repeats if plan.draft else 0.0
        self._gain = sum(right**n for n in range(plan.draft + 1))  # tokens of a step: the draft's and one
        self.count = max(1.0, (load.answer - 1) / self._gain)

    def seconds(self, streams: float, prompt: float = 0.0) -> float:
        """One step: the next token (and draft) of each stream, and so many tokens of prompts."""
        plan, load = self.plan, self.load
        drawn, held = streams * (1 + plan.draft), load.prompt + load.answer / 2
        first = drawn + min(1.0, prompt) if streams else prompt  # tokens of the first pass
        step = self._fingerprint.seconds(
            first,
            threads=plan.threads,
            rows=drawn,
            attended=prompt * (load.shared + load.fresh / 2) + (drawn - streams) * held,
            alone=streams * held,
            kv_type=plan.kv_type,
        )
        if drawn + prompt > first:
            step += self._fingerprint.seconds(drawn + prompt - first, threads=plan.threads)
        return step + streams * self._gain * DELIVERY_S

    def prompt(self, chunk: int) -> float:
        """A whole prompt by itself, in chunks of at most so many tokens."""
        load, plan, total, done = self.load, self.plan, 0.0, 0
        while done < load.fresh:
            count = min(chunk, load.fresh - done)
            attended = count * (load.prompt - load.fresh + done + (count + 1) / 2)
            total += self._fingerprint.seconds(
                count, threads=plan.threads, attended=attended, kv_type=plan.kv_type
            )
            done += count
        return total


def _pace(load: Load, first: float, late: float, rest: float) -> Pace:
    """rest: seconds from the first token of an answer to its last."""
    return Pace(first=first, first_late=late, itl=rest / max(1, load.answer - 1), cycle=first + rest)


def _together(steps: Steps, active: int) -> Pace:
    load, plan = steps.load, steps.plan
    if load.fresh < plan.prompts_step:
        firsts = _burst(steps, active)
    else:
        prefill = steps.prompt(min(plan.batch, load.fresh))
        firsts = tuple(prefill * (n + 1) for n in range(active))
    all_prompts = firsts[-1]
    rest = steps.count * steps.seconds(active)
    halted = all_prompts - sum(firsts) / active  # by the prompts that come after one's own
    return Pace(
        first=quantile(firsts, 0.5),
        first_late=quantile(firsts, _LATE),
        itl=(rest + halted) / max(1, load.answer - 1),
        cycle=all_prompts + rest,
        firsts=firsts,
    )


def _burst(steps: Steps, active: int) -> tuple[float, ...]:
    """When each of some prompts is through, of which several go in one batch."""
    left, now, firsts = [steps.load.fresh] * active, 0.0, []
    while left:
        room, lengths = steps.plan.prompts_step, []
        for tokens in left:
            lengths.append(min(room, tokens))
            room -= lengths[-1]
        ordered = sorted(length for length in lengths if length)
        for n, (before, length) in enumerate(itertools.pairwise((0, *ordered))):
            if length > before:
                now += steps.seconds(0, (length - before) * (len(ordered) - n))
        through = sum(length == tokens for length, tokens in zip(lengths, left, strict=True))
        now += through * DELIVERY_S
        firsts += [now] * through
        left = [tokens - length for length, tokens in zip(lengths, left, strict=True) if tokens > length]
    return tuple(firsts)


def _apart(steps: Steps, active: int) -> Pace:
    prefill, step = steps.prompt(steps.plan.chunk), steps.seconds(active)
    others = list(_binomial(active - 1, 1 / (steps.count + 1)))  # whose prompt comes in the same gap
    rest = steps.count * (step + sum(chance * n for n, chance in others) * prefill)
    wait = max(step / 2, step - ROUND_TRIP_S)
    first = wait + prefill + _quantile(others, 0.5) / 2 * prefill
    return _pace(steps.load, first, first + _quantile(others, _LATE) * prefill, rest)


def _mixed(steps: Steps, active: int) -> Pace:
    plan, load = steps.plan, steps.load
    room = max(plan.prompts_step, min(plan.batch, load.fresh))
    given = {k: max(1.0, min(k * plan.chunk, room, plan.batch - (active - k))) for k in range(1, active + 1)}
    chunks = {k: max(1.0, load.fresh * k / given[k]) for k in given}  # steps of a prompt that is one of k
    seconds = {k: steps.seconds(active - k, min(given[k], k * load.fresh)) for k in given}
    seconds[0] = steps.seconds(active)
    mean_chunks = chunks[1]
    for _ in range(_ROUNDS):
        others = list(_binomial(active - 1, mean_chunks / (mean_chunks + steps.count)))
        mean_chunks = sum(chance * chunks[n + 1] for n, chance in others)
    rest = steps.count * sum(chance * seconds[n] for n, chance in others)
    mean = sum(chance * chunks[n + 1] * seconds[n + 1] for n, chance in others)
    # They go one after the other: of those at it already, the first has half of its prompt behind it.
    early = sum(chance * chunks[n + 1] * seconds[n + 1] * _ahead(n + 1) for n, chance in others)
    wait = max(seconds[0] / 2, seconds[0] - ROUND_TRIP_S)
    late = _quantile(others, _LATE) + 1
    found = _pace(load, wait + early, wait + max(mean, chunks[late] * seconds[late]), rest)
    return msgspec.structs.replace(found, cycle=mean + rest)


def _ahead(prompts: int) -> float:
    """The share of the work on so many prompts that comes up to the end of the last of them."""
    return 1.0 if prompts == 1 else (prompts - 0.5) / prompts


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed, halfway between two where that falls between them."""
    place = share * len(values) - 0.5
    low = min(len(values) - 1, max(0, math.floor(place)))
    high = min(len(values) - 1, low + 1)
    ordered = sorted(values)
    return ordered[low] + (ordered[high] - ordered[low]) * min(1.0, max(0.0, place - low))


def _binomial(count: int, chance: float) -> Iterator[tuple[int, float]]:
    """Numbers out of `count` and their probabilities, but for the unlikely ones; they sum to 1."""
    found = [
        (n, likely)
        for n in range(count + 1)
        if (likely := math.comb(count, n) * chance**n * (1 - chance) ** (count - n)) > _UNLIKELY
    ]
    total = sum(likely for _, likely in found)
    return ((n, likely / total) for n, likely in found)


def _quantile(distribution: list[tuple[int, float]], share: float) -> int:
    below = 0.0
    for value, likely in distribution:
        below += likely
        if below >= share:
            return value
    return distribution[-1][0]
