"""From a fingerprint to what a plan will do under a load: times, rate, memory, work for a token, quality.

`pace.py` tells how fast requests go while n of them are answered; here follows how many that are. Users who
ask without a pause are always there, so n is their number or that of the slots. Otherwise it varies: a
birth-death chain over the requests in the system, which come at the rate of the load and leave at the rate of
the pace with that many, gives the share of time that each number is there (exact where the times of service
are exponential; tests/devices/test_cost.py compares it with the real scheduler in virtual time).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from lichen.devices.curves import Fingerprint
from lichen.devices.load import Load
from lichen.devices.pace import Pace, Plan, pace, quantile

QUEUE = 64  # requests that may wait for a slot; later ones are refused (the setting `queue`)
CELLS_STEP = 256  # llama.cpp rounds the cells of a slot up to a multiple of this

MemoryOf = Callable[[Fingerprint, Plan], int]
PaceOf = Callable[[int], Pace]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan does under a load.

    ttft, ttft_p95: seconds from a request to its first token, median and 95th percentile. itl: mean seconds
    between two tokens of an answer. rate: tokens a second of all users together. memory: bytes of the process
    at the peak. work: core-seconds a token, for the energy that it takes. kl: mean divergence from the asked
    file, in nats a token. refused: share of the requests that find the queue full. active: requests that are
    answered at once, on average while any is.
    """

    ttft: float
    ttft_p95: float
    itl: float
    rate: float
    memory: int
    work: float
    kl: float = 0.0
    refused: float = 0.0
    active: float = 1.0

    @property
    def quality(self) -> float:
        """Share of the asked file's predictions that is kept: exp(-kl)."""
        return math.exp(-self.kl)


def memory_bytes(fingerprint: Fingerprint, plan: Plan) -> int:
    """Bytes that the model adds to a process, by what was measured of it."""
    cells = -(-plan.context // CELLS_STEP) * CELLS_STEP * plan.slots
    kv = fingerprint.cache(plan.kv_type).cell_bytes * cells
    return round(fingerprint.weight_bytes + kv + fingerprint.compute.at(plan.batch) + fingerprint.fixed_bytes)


def predict(
    fingerprint: Fingerprint,
    plan: Plan,
    load: Load,
    *,
    kl: float = 0.0,
    memory: MemoryOf = memory_bytes,
    paces: PaceOf | None = None,
) -> Prediction:
    """What this plan does under this load.

    memory: gives the bytes of the process. paces: gives `pace` by the number of active requests, for
    callers that keep it for several plans.
    """
    at = paces or (lambda active: pace(fingerprint, plan, load, active))
    bytes_held = memory(fingerprint, plan)
    if load.arrivals is None and not load.pause:
        return _always(at, plan, load, bytes_held, kl)
    return _varying(at, plan, load, bytes_held, kl)


def _always(at: PaceOf, plan: Plan, load: Load, memory: int, kl: float) -> Prediction:
    """Users who are never away: those beyond the slots wait."""
    active = min(load.users, plan.slots)
    found = at(active)
    ttft, late = found.first, found.first_late
    if load.together:  # whole rounds: the later ones wait for all before them
        everyone = [found.cycle * (n // active) + found.firsts[n % active] for n in range(load.users)]
        ttft, late = quantile(everyone, 0.5), quantile(everyone, 0.95)
    elif load.users > active:
        wait = found.cycle * (load.users - active) / active
        ttft, late = ttft + wait, late + wait
    return Prediction(
        ttft=ttft,
        ttft_p95=late,
        itl=found.itl,
        rate=active * load.answer / found.cycle,
        memory=memory,
        work=plan.threads * found.cycle / (active * load.answer),
        kl=kl,
        active=active,
    )


def _varying(at: PaceOf, plan: Plan, load: Load, memory: int, kl: float) -> Prediction:
    most = plan.slots + QUEUE if load.arrivals is not None else min(load.users, plan.slots + QUEUE)
    slots = min(plan.slots, most)
    paces = [at(active) for active in range(1, slots + 1)]
    leaving = [min(n, slots) / paces[min(n, slots) - 1].cycle for n in range(1, most + 1)]
    coming = [_coming(load, n) for n in range(most)]
    chances = _stationary(coming, leaving)
    busy = 1 - chances[0]
    done = sum(chance * rate for chance, rate in zip(chances[1:], leaving, strict=True))
    answering = [chance * min(n, slots) for n, chance in enumerate(chances)]
    seen = [chance * rate for chance, rate in zip(chances, coming, strict=False)]  # by who comes
    firsts = []
    for n, likely in enumerate(seen):
        found, wait = paces[min(n, slots - 1)], max(0, n + 1 - slots) / leaving[-1]
        firsts += [(0.9 * likely, found.first + wait), (0.1 * likely, found.first_late + wait)]
    return Prediction(
        ttft=_weighted(firsts, 0.5),
        ttft_p95=_weighted(firsts, 0.95),
        itl=sum(answering)
        / sum(share / paces[min(n, slots) - 1].itl for n, share in enumerate(answering) if n),
        rate=done * load.answer,
        memory=memory,
        work=plan.threads * busy / (done * load.answer),
        kl=kl,
        refused=chances[-1] if load.arrivals is not None else 0.0,
        active=sum(answering) / busy,
    )


def _coming(load: Load, present: int) -> float:
    """Requests a second while so many are in the system."""
    if load.arrivals is not None:
        return load.arrivals
    return (load.users - present) / load.pause


def _stationary(coming: list[float], leaving: list[float]) -> list[float]:
    """Share of time with 0, 1, ... requests: up with rates `coming`, down with `leaving`.

    By logarithms, since the products under- and overflow."""
    logs = [0.0]
    for up, down in zip(coming, leaving, strict=True):
        logs.append(logs[-1] + math.log(up / down))
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _weighted(weighted: list[tuple[float, float]], share: float) -> float:
    """The value that `share` of the weight does not exceed; (weight, value)."""
    goal = share * sum(weight for weight, _ in weighted)
    below = 0.0
    for weight, value in sorted(weighted, key=lambda one: one[1]):
        below += weight
        if below >= goal:
            return value
    return max(value for _, value in weighted)
