"""From a fingerprint to what a plan will do under a load: times, rate, memory and work for a token.

The engine computes one batch after another, so time is the sum of batches. Per request and slot that is the
slot's own prompt, the prompts of the others that come between its tokens, and its decode steps, which it
shares with whoever decodes then. Users beyond the slots wait for one. `tests/devices/test_cost.py` compares
it with the real scheduler in virtual time.
"""

from __future__ import annotations

import math

import msgspec

from lichen.devices.curves import Fingerprint
from lichen.devices.intent import Load

P95 = 0.95


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model. layout: as the fingerprint names it. context: tokens a slot. batch: tokens a step;
    prompts_step, share: see `runtime/scheduler.py`. kv_type: of the KV cache."""

    layout: str
    threads: int
    slots: int
    context: int
    batch: int = 256
    prompts_step: int = 64
    share: int = 64
    kv_type: str = "f16"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan does under a load.

    ttft, ttft_p95: seconds from a request to its first token, median and 95th percentile. itl: mean seconds
    between two tokens of an answer. rate: tokens a second of all users together. memory: bytes at the peak.
    work: core-seconds a token, for the energy that it takes. kl: mean divergence from the asked file.
    """

    ttft: float
    ttft_p95: float
    itl: float
    rate: float
    memory: int
    work: float
    kl: float

    @property
    def quality(self) -> float:
        """Share of the asked file's predictions that is kept."""
        return math.exp(-self.kl)


def predict(fingerprint: Fingerprint, plan: Plan, load: Load, *, kl: float = 0.0) -> Prediction:
    """What this plan does under this load. Pure; some microseconds."""
    active = min(load.users, plan.slots)
    prefill = prefill_seconds(fingerprint, plan, load)
    gaps = (
        0 if active == 1 else math.ceil(load.fresh / plan.share) - 1
    )  # tokens of streams between its chunks
    steps = max(1, load.answer - 1)
    width = active * steps / (steps + gaps)
    if load.together:
        gaps, width = 0, float(active)  # all prompts first, then all answers side by side
    step = decode_seconds(fingerprint, plan, load, width)
    cycle = active * prefill + (steps + gaps) * step
    ttft, ttft_p95 = _first_token(load, active, prefill, step * gaps, step)
    if load.users > active:  # a user waits until a slot is free
        wait = cycle * (load.users - active) / active
        ttft, ttft_p95 = _waiting(load, active, cycle, wait, ttft, ttft_p95)
    between = 0.0 if load.together else (active - 1) * prefill
    return Prediction(
        ttft=ttft,
        ttft_p95=ttft_p95,
        itl=(steps * step + between * steps / (steps + gaps)) / steps,
        rate=active * load.answer / cycle,
        memory=memory_bytes(fingerprint, plan),
        work=plan.threads * cycle / (active * load.answer),
        kl=kl,
    )


def prefill_seconds(fingerprint: Fingerprint, plan: Plan, load: Load) -> float:
    """Seconds to compute one prompt, in the chunks that the scheduler makes of it."""
    active = min(load.users, plan.slots)
    chunk = plan.batch if active == 1 else max(plan.prompts_step, min(plan.batch, load.fresh))
    total, done = 0.0, load.shared
    while done < load.prompt:
        count = min(chunk, load.prompt - done)
        attended = count * (done + (count + 1) / 2)
        total += fingerprint.seconds(count, threads=plan.threads, attended=attended, kv_type=plan.kv_type)
        done += count
    return total


def decode_seconds(fingerprint: Fingerprint, plan: Plan, load: Load, width: float) -> float:
    """Seconds of one step of `width` streams (a mean, so it may lie between two whole numbers)."""
    attended = width * (load.prompt + load.answer / 2)
    low, high = math.floor(width), math.ceil(width)

    def at(count: int) -> float:
        return fingerprint.seconds(
            max(1, count), threads=plan.threads, rows=count, attended=attended, kv_type=plan.kv_type
        )

    return at(low) if low == high else at(low) + (width - low) * (at(high) - at(low))


def memory_bytes(fingerprint: Fingerprint, plan: Plan) -> int:
    """Bytes of the whole process at its peak."""
    kv = fingerprint.cache(plan.kv_type).cell_bytes * plan.context * plan.slots
    return round(fingerprint.weight_bytes + kv + fingerprint.compute.at(plan.batch) + fingerprint.fixed_bytes)


def _first_token(load: Load, active: int, prefill: float, between: float, step: float) -> tuple[float, float]:
    """Median and 95th percentile of the time to the first token, once a slot is free."""
    if load.together:  # one prompt after the other
        return prefill * (active + 1) / 2, prefill * max(1, math.ceil(P95 * active))
    if active == 1:
        return prefill, prefill
    own = step / 2 + prefill + between  # it comes in the middle of a step
    return own, own + step / 2 + prefill  # and may meet another prompt


def _waiting(
    load: Load, active: int, cycle: float, wait: float, ttft: float, ttft_p95: float
) -> tuple[float, float]:
    if load.together:  # whole rounds: the second half of the users waits for the first
        rounds = [index // active for index in range(load.users)]
        return ttft + cycle * rounds[load.users // 2], ttft_p95 + cycle * rounds[
            math.ceil(P95 * load.users) - 1
        ]
    return ttft + wait, ttft_p95 + wait
