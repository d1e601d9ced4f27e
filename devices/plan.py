"""From what somebody wants to how to run a model: every plan predicted, the best of them, and why.

The space is small once it is cut to what a load can use, so all of it is predicted. A plan stands in the
Pareto set if no other is at least as good in everything and better in something.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import msgspec

from lichen.devices.cost import Plan, Prediction, predict
from lichen.devices.curves import Fingerprint
from lichen.devices.intent import Intent, Load, Objectives
from lichen.errors import ConfigError

SLOTS = (1, 2, 4, 8, 16, 32)
BATCHES = (128, 256, 512)
SPEED_KEPT = 0.9  # of the fastest: what an intent of memory or battery may not go below
NEAR = 1.03  # predictions this close count as equal: then the simpler plan is taken


class Candidate(msgspec.Struct, frozen=True):
    """A plan and what it is predicted to do."""

    plan: Plan
    prediction: Prediction


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The pick, the Pareto set (the fastest first), and sentences that say why."""

    pick: Candidate
    front: tuple[Candidate, ...]
    reasons: tuple[str, ...]


class Unattainable(ConfigError):
    """No plan keeps all objectives. attainable: the best value of each broken one, in words."""

    def __init__(self, broken: Sequence[str]) -> None:
        super().__init__(
            f"No plan on this machine keeps what was asked: {'; '.join(broken)}.",
            hint="Ask for less, for fewer users, or for a smaller model.",
        )
        self.attainable = tuple(broken)


def choose(
    fingerprints: Sequence[Fingerprint],
    load: Load,
    *,
    intent: Intent = "balanced",
    objectives: Objectives | None = None,
    divergence: Mapping[str, float] | None = None,
    context: int = 4096,
    cores: int | None = None,
) -> Choice:
    """The best plan for an intent within the objectives.

    divergence: mean KL of each layout from the asked file; a layout that is not in it counts as unknown and
    is left out, the source's own is 0. context: tokens that a conversation may hold. cores: most threads.
    Raises Unattainable with the best that can be had, or ConfigError if nothing was measured.
    """
    objectives = objectives or Objectives()
    known = {"source": 0.0, **(divergence or {})}
    measured = [fingerprint for fingerprint in fingerprints if fingerprint.layout in known]
    if not measured:
        raise ConfigError("No layout of this model was measured.", hint="Run `lichen fingerprint MODEL`.")
    everything = [
        Candidate(plan, predict(fingerprint, plan, load, kl=known[fingerprint.layout]))
        for fingerprint in measured
        for plan in plans(fingerprint, load, context=context, cores=cores)
    ]
    allowed = [candidate for candidate in everything if not broken(candidate, objectives)]
    if not allowed:
        raise Unattainable(attainable(everything, objectives))
    front = pareto(allowed)
    pick = _best(front, intent)
    return Choice(pick=pick, front=front, reasons=reasons(pick, front, load, intent))


def plans(fingerprint: Fingerprint, load: Load, *, context: int, cores: int | None = None) -> list[Plan]:
    """All plans that make sense for a load: no slot that nobody uses, no context shorter than a request."""
    threads = sorted(
        {curve.threads for curve in fingerprint.threads if cores is None or curve.threads <= cores}
    )
    slots = [count for count in SLOTS if count <= load.users] or [1]
    if load.users not in slots and load.users < SLOTS[-1]:
        slots.append(load.users)
    room = max(context, load.prompt + load.answer)
    return [
        Plan(
            layout=fingerprint.layout,
            threads=used,
            slots=count,
            context=room,
            batch=batch,
            prompts_step=max(1, batch // 4),
            share=64,
            kv_type=cost.type,
        )
        for used, count, batch, cost in itertools.product(threads, slots, BATCHES, fingerprint.kv)
    ]


def broken(candidate: Candidate, objectives: Objectives) -> list[str]:
    """Names of the objectives that a candidate does not keep."""
    found = candidate.prediction
    limits = {
        "ttft": objectives.ttft is None or found.ttft <= objectives.ttft,
        "itl": objectives.itl is None or found.itl <= objectives.itl,
        "rate": objectives.rate is None or found.rate >= objectives.rate,
        "memory": objectives.memory is None or found.memory <= objectives.memory,
        "quality": found.quality >= objectives.quality,
    }
    return [name for name, kept in limits.items() if not kept]


def attainable(everything: Sequence[Candidate], objectives: Objectives) -> list[str]:
    """For each objective that stands in the way, the best that can be had while the others are kept."""
    told = []
    for name in ("ttft", "itl", "rate", "memory", "quality"):
        others = [one for one in everything if set(broken(one, objectives)) <= {name}]
        if others:
            told.append(_in_words(name, others, objectives))
    if told:
        return told
    for name in ("ttft", "itl", "rate", "memory", "quality"):
        if all(name in broken(one, objectives) for one in everything):
            told.append(_in_words(name, everything, objectives))
    return told or ["each objective can be kept alone, but no two of them together"]


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in everything, fastest answer first; of equal ones the first."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda candidate: _axes(candidate.prediction)):
        values = _axes(one.prediction)
        if not any(_at_least_as_good(_axes(other.prediction), values) for other in front):
            front.append(one)
    return tuple(front)


def reasons(pick: Candidate, front: Sequence[Candidate], load: Load, intent: Intent) -> tuple[str, ...]:
    """Why this one, in sentences with numbers."""
    found, plan = pick.prediction, pick.plan
    users = "user" if load.users == 1 else "users"
    told = [
        f"{_layout(plan.layout)} with {plan.slots} slots and {plan.threads} threads suits {intent} for "
        f"{load.users} {users} best: {found.rate:.0f} tokens/s, first token after "
        f"{1000 * found.ttft:.0f} ms, then one every {1000 * found.itl:.1f} ms, "
        f"{found.memory / 1e6:.0f} MB."
    ]
    for layout in sorted({other.plan.layout for other in front} - {plan.layout}):
        other = _best([one for one in front if one.plan.layout == layout], intent).prediction
        told.append(
            f"{_layout(layout)} would give {_share(other.rate, found.rate)} of its tokens/s, "
            f"{_share(other.ttft, found.ttft)} of its time to the first token and "
            f"{_share(other.memory, found.memory)} of its memory."
        )
    if found.kl > 0:
        told.append(f"Its predictions differ from the asked file's by a mean KL of {found.kl:.2g}.")
    return tuple(told)


def _best(candidates: Sequence[Candidate], intent: Intent) -> Candidate:
    """The best for an intent; of those that are nearly as good, the one that takes least memory and work."""
    fastest = max(one.prediction.rate for one in candidates)

    def score(one: Candidate) -> float:
        found = one.prediction
        slow = max(1.0, SPEED_KEPT * fastest / found.rate)
        match intent:
            case "latency":
                return found.ttft + 64 * found.itl
            case "throughput":
                return 1 / found.rate
            case "memory":
                return found.memory * slow**4
            case "battery":
                return found.work * slow
            case "balanced":
                return math.sqrt((found.ttft + 64 * found.itl) / found.rate) * found.memory**0.25

    least = min(score(one) for one in candidates)
    near = [one for one in candidates if score(one) <= NEAR * least]
    return min(near, key=lambda one: (one.prediction.memory * one.prediction.work, score(one)))


def _axes(found: Prediction) -> tuple[float, ...]:
    return (found.ttft, found.itl, 1 / found.rate, found.memory, found.work, found.kl)


def _at_least_as_good(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def _in_words(name: str, candidates: Sequence[Candidate], objectives: Objectives) -> str:
    found = [one.prediction for one in candidates]
    match name:
        case "ttft":
            best, asked = min(one.ttft for one in found), objectives.ttft or 0
            return f"a first token after {1000 * best:.0f} ms is attainable, not {1000 * asked:.0f} ms"
        case "itl":
            best, asked = min(one.itl for one in found), objectives.itl or 0
            return f"{1000 * best:.1f} ms between tokens are attainable, not {1000 * asked:.1f} ms"
        case "rate":
            best, asked = max(one.rate for one in found), objectives.rate or 0
            return f"{best:.0f} tokens/s are attainable, not {asked:.0f}"
        case "memory":
            best, asked = min(one.memory for one in found), objectives.memory or 0
            return f"{best / 1e6:.0f} MB are needed, more than {asked / 1e6:.0f} MB"
        case _:
            best = max(one.quality for one in found)
            return f"a quality of {best:.4f} is attainable, not {objectives.quality:.4f}"


def _layout(name: str) -> str:
    return "The file as it is" if name == "source" else f"A copy as {name}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2f}x"
