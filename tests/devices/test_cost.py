"""Predicted costs beside the real scheduler in virtual time, and what must hold of any prediction."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.devices.cost import memory_bytes, predict
from lichen.devices.load import Load
from lichen.devices.pace import DELIVERY_S, Plan
from tests.devices.curves_at_hand import fingerprint
from tests.devices.virtual_engine import VirtualEngine

CROWDS = (  # users, slots, prompt, answer
    (1, 4, 64, 64),
    (4, 4, 48, 64),
    (4, 4, 512, 64),
    (16, 16, 64, 64),
    (16, 16, 256, 32),
    (8, 8, 1000, 64),
    (16, 4, 128, 64),
)


def plan(layout: str = "source", slots: int = 4, **more: Any) -> Plan:
    return Plan(layout=layout, threads=2, slots=slots, context=2048, **more)


def _loads(users: int, slots: int, prompt: int, answer: int, layout: str) -> list[Load]:
    size: dict[str, Any] = {"prompt": prompt, "answer": answer}
    most = (
        predict(fingerprint(layout), plan(layout, slots), Load(users=max(users, slots), **size)).rate / answer
    )
    return [
        Load(users=users, **size),
        Load(users=users, together=True, **size),
        Load(users=users, pause=5.0, **size),
        Load(arrivals=0.6 * most, **size),
    ]


def test_predictions_follow_the_scheduler() -> None:
    """56 pairs of plan and load; the bounds are those that predictions must keep against a machine."""
    errors: dict[str, list[float]] = {"ttft": [], "itl": [], "rate": []}
    for number, (users, slots, prompt, answer) in enumerate(CROWDS):
        for layout in ("source", "F16"):
            measured, used = fingerprint(layout), plan(layout, slots)
            for load in _loads(users, slots, prompt, answer, layout):
                few = load.arrivals is None and not load.pause
                seen = VirtualEngine(measured, used, load, seed=number).run(4 * users if few else 120)
                found = predict(measured, used, load)
                errors["ttft"].append(found.ttft / statistics.median(seen.ttft) - 1)
                errors["itl"].append(found.itl / seen.itl - 1)
                errors["rate"].append(found.rate / seen.rate - 1)
    for name, each in errors.items():
        sizes = sorted(abs(error) for error in each)
        assert statistics.median(sizes) <= 0.08, (name, sizes)
        assert sizes[int(0.9 * len(sizes))] <= 0.3, (name, sizes)


def test_one_user_waits_for_the_prompt_and_then_for_steps() -> None:
    curves = fingerprint("source")
    found = predict(curves, plan(), Load(prompt=512, answer=65))
    chunk = curves.seconds(256, threads=2, attended=256 * 128.5)
    second = curves.seconds(256, threads=2, attended=256 * (256 + 128.5))
    step = curves.seconds(1, threads=2, alone=512 + 32.5) + DELIVERY_S
    assert found.ttft == pytest.approx(chunk + second)
    assert found.itl == pytest.approx(step)
    assert found.rate == pytest.approx(65 / (chunk + second + 64 * step))
    assert found.work == pytest.approx(2 / found.rate)


def test_more_than_can_be_answered_is_refused() -> None:
    found = predict(fingerprint("source"), plan(), Load(arrivals=100, prompt=256))
    assert found.refused > 0.9
    assert found.rate == pytest.approx(
        predict(fingerprint("source"), plan(), Load(users=4, prompt=256)).rate, rel=0.05
    )
    assert found.ttft > 60
    calm = predict(fingerprint("source"), plan(), Load(arrivals=0.01))
    assert calm.refused < 1e-9
    assert calm.ttft == pytest.approx(predict(fingerprint("source"), plan(), Load()).ttft, rel=0.02)


def test_a_draft_that_is_right_pays_where_wide_steps_are_cheap() -> None:
    load = Load(repeats=0.9)
    f16 = [predict(fingerprint("F16"), plan("F16", draft=draft), load).itl for draft in (0, 4)]
    q4 = [predict(fingerprint("source"), plan(draft=draft), Load(repeats=0.2)).itl for draft in (0, 4)]
    assert f16[1] < 0.7 * f16[0]
    assert q4[1] > q4[0]


def test_a_cached_beginning_is_not_computed_again() -> None:
    whole, cached = (
        predict(fingerprint("source"), plan(), Load(prompt=1000, shared=shared)).ttft for shared in (0, 900)
    )
    assert cached < 0.25 * whole


LOADS = st.builds(
    Load,
    users=st.integers(1, 40),
    prompt=st.integers(1, 2000),
    answer=st.integers(1, 500),
    together=st.booleans(),
)
PLANS = st.builds(
    Plan,
    layout=st.just("source"),
    threads=st.sampled_from((1, 2)),
    slots=st.integers(1, 32),
    context=st.just(4096),
    batch=st.sampled_from((128, 256, 512)),
    chunk=st.sampled_from((32, 64, 128)),
)


@settings(deadline=None, max_examples=60)
@given(PLANS, LOADS, st.sampled_from(("source", "F16")))
def test_more_to_do_never_brings_a_first_token_earlier(used: Plan, load: Load, layout: str) -> None:
    curves = fingerprint(layout)
    here = predict(curves, used, load)
    longer = predict(curves, used, msgspec.structs.replace(load, prompt=2 * load.prompt))
    more = predict(curves, used, msgspec.structs.replace(load, users=2 * load.users))
    assert longer.ttft >= 0.95 * here.ttft
    assert more.ttft_p95 >= 0.95 * here.ttft_p95
    assert min(here.ttft, here.itl, here.rate, here.work) > 0
    assert here.ttft_p95 >= 0.99 * here.ttft
    assert more.memory == here.memory


@settings(deadline=None, max_examples=40)
@given(PLANS, st.floats(1e-3, 3))
def test_busier_arrivals_wait_longer(used: Plan, arrivals: float) -> None:
    curves = fingerprint("source")
    here, busier = (predict(curves, used, Load(arrivals=rate)) for rate in (arrivals, 1.5 * arrivals))
    assert busier.ttft >= 0.99 * here.ttft
    assert busier.refused >= here.refused * 0.999
    assert busier.rate >= 0.99 * here.rate


def test_memory_is_weights_cells_and_buffers() -> None:
    curves = fingerprint("source")
    found = memory_bytes(curves, plan(slots=2))
    assert found == 98_362_432 + 60_000_000 + 2 * 2048 * 23_040 + round(curves.compute.at(256))
    assert memory_bytes(curves, plan(slots=3)) - found == 2048 * 23_040
