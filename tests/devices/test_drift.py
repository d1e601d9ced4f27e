"""What windows say of a load, and when a change of plan goes through."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.devices.cost import predict
from lichen.devices.drift import Hysteresis, Window, slowdown, stricter
from lichen.devices.intent import Objectives
from lichen.devices.load import Load
from lichen.devices.pace import Plan
from tests.devices.curves_at_hand import fingerprint

PLAN = Plan(layout="source", threads=2, slots=4, context=2048)
OTHER = msgspec.structs.replace(PLAN, slots=8)
WINDOW = Window(
    busy=10.0,
    active=7.6,
    requests=20,
    completed=19,
    prompt_tokens=4000,
    cached_tokens=1000,
    completion_tokens=1235,
    first_tokens=20,
    ttft_s=8.0,
)


def test_a_window_shows_its_load() -> None:
    assert WINDOW.load() == Load(users=8, prompt=200, answer=65, shared=50)
    assert WINDOW.rate == pytest.approx(123.5)
    assert WINDOW.ttft == pytest.approx(0.4)
    for less in ({"completed": 2}, {"requests": 0}, {"busy": 0.0}):
        assert msgspec.structs.replace(WINDOW, **less).load() is None


@given(
    st.builds(
        Window,
        busy=st.floats(0, 100),
        active=st.floats(0, 1e6),
        requests=st.integers(0, 10**6),
        completed=st.integers(0, 10**6),
        prompt_tokens=st.integers(0, 10**9),
        cached_tokens=st.integers(0, 10**9),
        completion_tokens=st.integers(0, 10**9),
        first_tokens=st.integers(0, 10**6),
        ttft_s=st.floats(0, 1e6),
    )
)
def test_whatever_was_counted_is_a_load_or_none(window: Window) -> None:
    load = window.load()
    assert load is None or load.users >= 1
    found = predict(fingerprint("source"), PLAN, Load())
    assert 1 <= slowdown(found, window) <= 4


def test_a_slow_machine_makes_objectives_stricter() -> None:
    found = predict(fingerprint("source"), PLAN, Load())
    half = msgspec.structs.replace(WINDOW, busy=10.0, completion_tokens=round(5 * found.rate))
    assert slowdown(found, half) == pytest.approx(2, rel=0.01)
    asked = stricter(Objectives(ttft=0.4, rate=50, memory=300), 2.0, 200)
    assert asked == Objectives(ttft=0.2, rate=100, memory=200)
    assert stricter(Objectives(), 2.0, None) == Objectives()


def test_noise_changes_nothing_and_a_lasting_gain_does() -> None:
    decided = Hysteresis(gain=1.15, times=3, rest_s=60)
    assert not any(decided.ready(OTHER, 1.1, 1.0, now) for now in range(10)), "too little gain"
    assert not any(decided.ready(OTHER if now % 2 else PLAN, 2.0, 1.0, now) for now in range(10)), (
        "each time another"
    )
    assert not decided.ready(PLAN, 2.0, 1.0, 19)
    assert [decided.ready(OTHER, 2.0, 1.0, now) for now in (20, 21)] == [False, False]
    assert not decided.ready(OTHER, 1.0, 1.0, 22), "a window without gain begins the count anew"
    assert [decided.ready(OTHER, math.inf, 1.0, now) for now in (23, 24, 25)] == [False, False, True]
    decided.changed(25)
    assert not any(decided.ready(PLAN, 9.0, 1.0, now) for now in range(26, 84)), "it rests"
    assert decided.ready(PLAN, 9.0, 1.0, 85)
