"""The choice of a plan: every intent, every objective, and what cannot be had."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.devices.curves import Curve, ThreadCurve
from lichen.devices.intent import INTENTS, Intent, Objectives
from lichen.devices.load import Load
from lichen.devices.plan import Space, axes, best, candidates, choose, cost, pacemaker, pareto
from lichen.devices.telling import reasons
from lichen.devices.telling import settings as settings_of
from lichen.devices.verdict import broken
from lichen.errors import ConfigError
from tests.devices.curves_at_hand import ALL, DIVERGENCE, fingerprint

SPACE = Space(divergence=DIVERGENCE)


def picked(load: Load, *intents: Intent, **limits: float) -> str:
    found = choose(ALL, load, intents=intents, objectives=Objectives(**limits), space=SPACE)  # type: ignore[arg-type]
    return found.pick.plan.layout


def test_the_best_layout_follows_the_load() -> None:
    """As it was measured: the compact file for one user, wide batches on F16."""
    assert picked(Load(prompt=16, answer=256), "latency") == "source"
    assert picked(Load(users=16, together=True), "throughput") == "F16"
    assert picked(Load(users=1), "memory") == "source"


def test_each_intent_is_the_best_at_its_own() -> None:
    load = Load(users=8, prompt=200)
    everything = candidates(ALL, load, SPACE)
    for intent in INTENTS:
        fastest = pacemaker(everything, intent)
        found = choose(ALL, load, intents=(intent,), space=SPACE).pick.prediction
        least = min(cost(one.prediction, intent, fastest) for one in everything)
        assert cost(found, intent, fastest) <= 1.03 * least * 1.0001


def test_who_saves_memory_is_not_measured_by_a_larger_copy() -> None:
    """On some machines Q8_0 is faster than the file, for half as much memory again."""
    slow = fingerprint("source")
    quick = msgspec.structs.replace(fingerprint("Q8_0"), threads=tuple(map(_twice_as_fast, slow.threads)))
    load = Load(users=1, prompt=16, answer=64)
    layouts = {
        intent: choose((slow, quick), load, intents=(intent,), space=SPACE).pick.plan.layout
        for intent in INTENTS
    }
    assert layouts["memory"] == "source" and layouts["latency"] == layouts["battery"] == "Q8_0"


def _twice_as_fast(curve: ThreadCurve) -> ThreadCurve:
    points = tuple((tokens, seconds / 2) for tokens, seconds in curve.batch.points)
    return msgspec.structs.replace(curve, batch=Curve(points))


def test_the_second_intent_decides_between_equals() -> None:
    load = Load(users=4)
    first = choose(ALL, load, intents=("throughput",), space=SPACE).pick.prediction
    both = choose(ALL, load, intents=("throughput", "latency"), space=SPACE).pick.prediction
    assert both.rate >= first.rate / 1.03 / 1.03
    assert both.ttft + 64 * both.itl <= first.ttft + 64 * first.itl


def test_an_unknown_quality_is_left_out_and_a_bad_one_refused() -> None:
    load = Load(users=16, together=True)
    assert choose(ALL, load, intents=("throughput",)).pick.plan.layout == "source"
    damaged = Space(divergence={"F16": 0.38, "Q8_0": 1e-4})
    assert choose(ALL, load, intents=("throughput",), space=damaged).pick.plan.layout == "Q8_0"
    accepted = Objectives(quality=0.5)
    found = choose(ALL, load, intents=("throughput",), objectives=accepted, space=damaged)
    assert found.pick.plan.layout == "F16"


def test_what_was_given_stays() -> None:
    space = Space(divergence=DIVERGENCE, fixed={"slots": 3, "threads": 1, "batch": 128}, context=512)
    found = choose(ALL, Load(users=8), space=space).pick.plan
    assert (found.slots, found.threads, found.batch, found.context) == (3, 1, 128, 512)
    long = choose(ALL, Load(prompt=5000), space=space).pick.plan
    assert long.context == 5376  # a request must fit: 5,128 in whole steps of 256 cells


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"ttft": 1e-3}, "a first token after"),
        ({"itl": 1e-4}, "between two tokens are attainable"),
        ({"rate": 1e6}, "tokens/s are attainable, not 1,000,000"),
        ({"memory": 1_000_000}, "MB are needed, more than 1 MB"),
        ({"memory": 250_000_000, "rate": 400}, " with "),
    ],
)
def test_what_cannot_be_had_is_said_with_what_can(limits: dict[str, float], words: str) -> None:
    load = Load(users=8)
    with pytest.raises(ConfigError) as caught:
        choose(ALL, load, objectives=Objectives(**limits), space=SPACE)  # type: ignore[arg-type]
    assert "No plan on this machine keeps what was asked" in str(caught.value)
    assert words in str(caught.value)


def test_what_is_said_to_be_attainable_is() -> None:
    load = Load(users=8)
    least = min(one.prediction.ttft for one in candidates(ALL, load, SPACE))
    found = choose(ALL, load, objectives=Objectives(ttft=least * 1.0001), space=SPACE)
    assert found.pick.prediction.ttft <= least * 1.0001
    with pytest.raises(ConfigError, match="attainable"):
        choose(ALL, load, objectives=Objectives(ttft=least * 0.99), space=SPACE)


def test_a_load_that_is_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match="would be refused"):
        choose(ALL, Load(arrivals=1000), space=SPACE)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ConfigError, match="lichen fingerprint"):
        choose([], Load())
    with pytest.raises(ConfigError, match="no layout of known quality"):
        choose([fingerprint("F16")], Load())


def test_planning_is_quick() -> None:
    """Its time of this process alone, since machines are shared."""
    for load in (Load(users=32, prompt=500), Load(arrivals=0.5, repeats=0.5)):
        started = time.process_time()
        choose(ALL, load, intents=("balanced",), space=SPACE)
        assert time.process_time() - started < 3


def test_reasons_name_the_numbers_and_the_others() -> None:
    load = Load(users=16, prompt=100)
    choice = choose(ALL, load, intents=("throughput",), space=SPACE)
    told = " ".join(reasons(choice, load, ("throughput",), {"slots": 16}))
    assert "16 users, prompts of 100 and answers of 128 tokens" in told
    assert f"{choice.pick.prediction.rate:,.0f} tokens/s" in told
    assert "You chose yourself, and it stays: slots 16." in told
    assert settings_of(choice.pick.plan)["speculation"] == "off"


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 20),
    st.integers(1, 800),
    st.sampled_from(INTENTS),
    st.floats(0.01, 5),
    st.integers(150_000_000, 600_000_000),
)
def test_a_pick_keeps_every_objective(
    users: int, prompt: int, intent: Intent, ttft: float, memory: int
) -> None:
    load, objectives = Load(users=users, prompt=prompt), Objectives(ttft=ttft, memory=memory)
    try:
        choice = choose(ALL, load, intents=(intent,), objectives=objectives, space=SPACE)
    except ConfigError:
        everything = candidates(ALL, load, SPACE)
        assert all(broken(one, objectives) for one in everything)
        return
    assert choice.pick in choice.front
    assert not any(broken(one, objectives) for one in choice.front)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=25, unique=True))
def test_nothing_beats_the_front_and_the_front_beats_the_rest(places: list[int]) -> None:
    everything = _EVERYTHING
    some = [everything[place % len(everything)] for place in places]
    front = pareto(some)
    values = [axes(one.prediction) for one in front]
    for one in some:
        own = axes(one.prediction)
        assert one in front or any(all(a <= b for a, b in zip(v, own, strict=True)) for v in values)
    for own in values:
        assert not any(v != own and all(a <= b for a, b in zip(v, own, strict=True)) for v in values)
    assert best(front, ("balanced",)) in front


_EVERYTHING = candidates(ALL, Load(users=8, prompt=100), SPACE)
