"""From what somebody wants to how to run a model: every plan predicted, the best of them, and why.

The space is small once it is cut to what a load can use, so all of it is predicted. A plan stands in the
Pareto set if no other is at least as good in everything and better in something. What an intent makes of the
predictions is a cost, the smaller the better; plans within 3 % of the least count as equal, since predictions
are no more certain than that, and then the next intent decides, at last memory and work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import msgspec

from lichen.devices.cost import CELLS_STEP, MemoryOf, Prediction, memory_bytes, predict
from lichen.devices.curves import Fingerprint
from lichen.devices.intent import Intent, Objectives
from lichen.devices.load import Load
from lichen.devices.pace import Pace, Plan, pace
from lichen.devices.verdict import Candidate, broken, unattainable
from lichen.errors import ConfigError

SLOTS = (1, 2, 4, 8, 16, 32)
BATCHES = (64, 128, 256, 512)
CHUNKS = (64, 256)
DRAFTS = (0, 2, 4, 8)
SPEED_KEPT = 0.9  # of `pacemaker`: what the intents memory and battery may not go below
PATIENCE_S = 1.0  # for a first token: less is not worth memory
NEAR = 1.03
ANSWER = 64  # tokens of an answer that somebody reads before the rest counts for latency


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The pick, and the Pareto set, shortest time to the first token first."""

    pick: Candidate
    front: tuple[Candidate, ...]


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """What plans are made of besides what was measured.

    context: tokens that a conversation must have room for. cores: most threads (None: as many as were
    measured). fixed: fields of `Plan` that are given, by name. divergence: mean KL of each layout from the
    asked file, and of each "kv TYPE" of the KV cache; what is not in it is unknown and left out, but for the
    file as it is and an f16 cache. memory: bytes of a process that runs a plan.
    """

    context: int = 4096
    cores: int | None = None
    fixed: Mapping[str, int | str] = {}
    divergence: Mapping[str, float] = {}
    memory: MemoryOf = memory_bytes

    def kl(self, plan: Plan) -> float | None:
        """Divergence of a plan's answers from the asked file's; None where it is unknown."""
        known = {"source": 0.0, "kv f16": 0.0, **self.divergence}
        parts = [known.get(plan.layout), known.get(f"kv {plan.kv_type}")]
        return sum(part for part in parts if part is not None) if None not in parts else None


def choose(
    fingerprints: Sequence[Fingerprint],
    load: Load,
    *,
    intents: Sequence[Intent] = ("balanced",),
    objectives: Objectives = Objectives(),  # noqa: B008 - immutable
    space: Space = Space(),  # noqa: B008
) -> Choice:
    """The best plan within the objectives, for the first intent and, of equal ones, for the next.

    Raises ConfigError (`verdict.py` says what stands in the way) if none keeps them, or nothing was
    measured.
    """
    everything = candidates(fingerprints, load, space)
    allowed = [one for one in everything if not broken(one, objectives)]
    if not allowed:
        raise unattainable(everything, objectives)
    front = pareto(allowed)
    return Choice(pick=best(front, intents), front=front)


def candidates(fingerprints: Sequence[Fingerprint], load: Load, space: Space) -> list[Candidate]:
    """All plans that make sense, with their predictions. Raises ConfigError if there are none."""
    found = []
    for fingerprint in fingerprints:
        kept: dict[tuple[Plan, int], Pace] = {}  # plans that differ in slots alone share their paces
        for plan in plans(fingerprint, load, space):
            kl = space.kl(plan)
            if kl is None:
                continue
            paces = _paces(fingerprint, plan, load, kept)
            prediction = predict(fingerprint, plan, load, kl=kl, memory=space.memory, paces=paces)
            found.append(Candidate(plan, prediction))
    if not found:
        raise ConfigError(
            "There is no plan to choose from: no layout of known quality was measured, or the settings that "
            "were given exclude all.",
            hint="Measure it: lichen fingerprint MODEL --layouts source,q8_0,f16",
        )
    return found


def _paces(
    fingerprint: Fingerprint, plan: Plan, load: Load, kept: dict[tuple[Plan, int], Pace]
) -> Callable[[int], Pace]:
    same = msgspec.structs.replace(plan, slots=1)

    def at(active: int) -> Pace:
        found = kept.get((same, active))
        if found is None:
            found = kept[same, active] = pace(fingerprint, plan, load, active)
        return found

    return at


def plans(fingerprint: Fingerprint, load: Load, space: Space) -> list[Plan]:
    """All plans that make sense for a load: no slot that nobody uses, no context shorter than a request."""
    threads = [curve.threads for curve in fingerprint.threads]
    if space.cores is not None:
        threads = [count for count in threads if count <= space.cores] or [min(threads)]
    slots = [count for count in SLOTS if count <= load.most]
    if load.most not in slots and load.most < SLOTS[-1]:
        slots.append(load.most)
    options: dict[str, Sequence[int | str]] = {
        "threads": sorted(set(threads)),
        "slots": slots,
        "context": [max(space.context, -(-(load.prompt + load.answer) // CELLS_STEP) * CELLS_STEP)],
        "batch": BATCHES,
        "chunk": CHUNKS if load.most > 1 else CHUNKS[:1],
        "kv_type": [cost.type for cost in fingerprint.kv],
        "draft": DRAFTS if load.repeats else DRAFTS[:1],
    }
    options |= {name: [value] for name, value in space.fixed.items() if name in options}
    made = (dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))
    return [
        msgspec.convert({"layout": fingerprint.layout, **fields}, Plan)
        for fields in made
        if int(fields["chunk"]) <= int(fields["batch"])
    ]


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in everything, earliest first token first; of equal ones the first."""
    front: list[tuple[tuple[float, ...], Candidate]] = []
    for values, one in sorted(((axes(one.prediction), one) for one in candidates), key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, values, strict=True)) for other, _ in front):
            front.append((values, one))
    return tuple(one for _, one in front)


def axes(found: Prediction) -> tuple[float, ...]:
    """What a person may want little of."""
    return (found.ttft, found.itl, 1 / found.rate, found.memory, found.work, found.kl)


def best(candidates: Sequence[Candidate], intents: Sequence[Intent]) -> Candidate:
    """The best for the first intent; of those nearly as good for the next, and so on.

    Of what is left then, the one that takes the least memory and work and lets nobody wait for long.
    """
    left = list(candidates)
    for intent in intents:
        fastest = pacemaker(candidates, intent)
        costs = {id(one): cost(one.prediction, intent, fastest) for one in left}
        least = min(costs.values())
        left = [one for one in left if costs[id(one)] <= NEAR * least]

    def burden(one: Candidate) -> tuple[float, tuple[float, ...]]:
        found = one.prediction
        return found.memory * found.work * max(PATIENCE_S, found.ttft), axes(found)

    return min(left, key=burden)


def pacemaker(candidates: Sequence[Candidate], intent: Intent) -> float:
    """The rate, in tokens a second, that an intent measures slowness by: of the fastest plan.

    Who saves memory wants no larger copy of the file to be the measure, so there only plans that run the file
    as it is count, if there are any.
    """
    as_it_is = [one for one in candidates if one.plan.layout == "source"] if intent == "memory" else []
    return max(one.prediction.rate for one in as_it_is or candidates)


def cost(found: Prediction, intent: Intent, fastest: float) -> float:
    """What an intent wants little of. fastest: as `pacemaker` has it."""
    slow = max(1.0, SPEED_KEPT * fastest / found.rate)
    answer = found.ttft + ANSWER * found.itl
    match intent:
        case "latency":
            return answer
        case "throughput":
            return 1 / found.rate
        case "memory":
            return found.memory * slow**4
        case "battery":
            return found.work * slow
        case "balanced":
            return float((answer / found.rate) ** 0.5 * found.memory**0.25)
