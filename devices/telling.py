"""A choice in sentences: why this plan, what the others would give, and what it sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lichen.devices.cost import Prediction
from lichen.devices.intent import Intent
from lichen.devices.load import Load
from lichen.devices.pace import Plan
from lichen.devices.plan import Choice, best

SETTINGS = ("threads", "slots", "context", "batch", "chunk", "kv_type", "speculation")


def settings(plan: Plan) -> dict[str, int | str]:
    """The settings of lichen that a plan sets, by name; the layout is none of them."""
    return {
        "threads": plan.threads,
        "slots": plan.slots,
        "context": plan.context,
        "batch": plan.batch,
        "chunk": plan.chunk,
        "kv_type": plan.kv_type,
        "speculation": "suffix" if plan.draft else "off",
    }


def reasons(
    choice: Choice, load: Load, intents: Sequence[Intent], fixed: Mapping[str, int | str]
) -> tuple[str, ...]:
    """Why the pick, in sentences with numbers. fixed: what was given and not chosen."""
    pick, plan = choice.pick.prediction, choice.pick.plan
    told = [
        f"For {_wanted(intents)} with {_load(load)}: {layout_words(plan.layout)}, "
        f"{_count(plan.slots, 'slot')} and {_count(plan.threads, 'thread')} give "
        f"{pick.rate:,.0f} tokens/s, the first token after {duration(pick.ttft)}, then one every "
        f"{duration(pick.itl)}, in {pick.memory / 1e6:,.0f} MB."
    ]
    for layout in sorted({one.plan.layout for one in choice.front} - {plan.layout}):
        other = best([one for one in choice.front if one.plan.layout == layout], intents)
        told.append(_beside(other.prediction, pick, layout, other.plan.slots))
    told += _trade(choice)
    if pick.kl > 0:
        told.append(
            f"Its predictions differ from those of the asked file by a mean KL of {pick.kl:.2g} nats."
        )
    if fixed:
        given = ", ".join(f"{name} {value}" for name, value in fixed.items())
        told.append(f"You chose yourself, and it stays: {given}.")
    return tuple(told)


def layout_words(name: str) -> str:
    """A layout for people."""
    return "the file as it is" if name == "source" else f"a copy of it as {name}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _beside(other: Prediction, pick: Prediction, layout: str, slots: int) -> str:
    return (
        f"{layout_words(layout).capitalize()} would give {_ratio(other.rate, pick.rate)} the tokens/s, "
        f"{_ratio(other.ttft, pick.ttft)} the time to the first token and "
        f"{_ratio(other.memory, pick.memory)} the memory ({_count(slots, 'slot')})."
    )


def _trade(choice: Choice) -> list[str]:
    """What the ends of the Pareto set would cost, where they are not the pick."""
    pick, told = choice.pick, []
    fastest = max(choice.front, key=lambda one: one.prediction.rate)
    if fastest is not pick and fastest.prediction.rate > 1.03 * pick.prediction.rate:
        told.append(
            f"At most {fastest.prediction.rate:,.0f} tokens/s can be had, with the first token after "
            f"{duration(fastest.prediction.ttft)} and {fastest.prediction.memory / 1e6:,.0f} MB."
        )
    smallest = min(choice.front, key=lambda one: one.prediction.memory)
    if smallest is not pick and smallest.prediction.memory < 0.97 * pick.prediction.memory:
        told.append(
            f"The least memory is {smallest.prediction.memory / 1e6:,.0f} MB, at "
            f"{smallest.prediction.rate:,.0f} tokens/s."
        )
    return told


def _wanted(intents: Sequence[Intent]) -> str:
    return ", then ".join(intents)


def _load(load: Load) -> str:
    size = f"prompts of {load.prompt:,} and answers of {load.answer:,} tokens"
    if load.arrivals is not None:
        return f"{load.arrivals:g} requests a second, {size}"
    pause = f" who pause {duration(load.pause)}" if load.pause else ""
    return f"{_count(load.users, 'user')}{pause}, {size}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f} times"
