"""Any order of requests with any adaptations over a counting context: no slot ever mixes two of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.errors import EngineError
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.engine import Engine
from lichen.runtime.generation import Generation, Mailbox
from lichen.runtime.scheduler import TURN_STEPS, Budget, Scheduler
from lichen.runtime.sequence import SamplingOptions, Sequence
from tests.runtime.fake_native import CountingAdapter, CountingContext, CountingModel, CountingSampler

A, HALF, B = Adaptation("a", 1.0), Adaptation("a", 0.5), Adaptation("b", 1.0)
ADAPTATIONS = (PLAIN, A, HALF, B)


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.runtime.drawing.Sampler", CountingSampler)
    monkeypatch.setattr("lichen.runtime.adapter_bank.Adapter", CountingAdapter)


class Bench:
    """An engine with the adapters a and b; its context refuses a slot that two adaptations computed."""

    def __init__(self, slots: int = 3) -> None:
        self.context = CountingContext(slots=slots, context=64, batch=8)
        model: Any = CountingModel()
        context: Any = self.context
        self.engine = Engine(model, context, queue_limit=256)
        for name in ("a", "b"):
            self.engine.call(lambda name=name: self.engine.adapters.load(name, Path(name)))  # type: ignore[misc]

    def submit(self, prompt: list[int], adaptation: Adaptation, **options: Any) -> Generation:
        mailbox = Mailbox()
        sequence = Sequence(
            prompt=prompt, options=SamplingOptions(**options), mailbox=mailbox, adaptation=adaptation
        )
        self.engine.submit(sequence)
        return Generation(sequence, mailbox, self.engine.cancel)

    async def close(self) -> None:
        self.context.gate.set()
        await asyncio.to_thread(self.engine.close)


Request = tuple[int, int, int, bool]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 12), st.booleans()),
        min_size=1,
        max_size=14,
    )
)
async def test_no_slot_mixes_adaptations_and_all_are_answered(requests: list[Request]) -> None:
    bench = Bench()
    try:
        running = [
            bench.submit(
                list(range(length)), ADAPTATIONS[which], max_tokens=count, deterministic=deterministic
            )
            for which, length, count, deterministic in requests
        ]
        for (_, length, count, _), generation in zip(requests, running, strict=True):
            expected = "".join(f"{length + number} " for number in range(count))
            assert await asyncio.wait_for(generation.text(), 20) == expected
    finally:
        await bench.close()


async def test_a_beginning_is_used_again_with_the_same_adaptation_only() -> None:
    bench = Bench(slots=4)
    try:
        for number, adaptation in enumerate([*ADAPTATIONS, *ADAPTATIONS]):
            generation = bench.submit([*range(30), 50 + number], adaptation, max_tokens=1)
            await generation.text()
            assert generation.finished is not None
            assert generation.finished.usage.cached_tokens == (30 if number >= 4 else 0)
    finally:
        await bench.close()


async def test_an_adapter_that_is_not_there_fails_its_requests_and_no_others() -> None:
    bench = Bench()
    try:
        good = bench.submit([1, 2], A, max_tokens=20)
        with pytest.raises(EngineError, match="not in memory"):
            await bench.submit([1, 2], Adaptation("gone", 1.0), max_tokens=3).text()
        assert (await good.text()).startswith("3 4 5")
        assert await bench.submit([1, 2], PLAIN, max_tokens=2).text() == "3 4 "
    finally:
        await bench.close()


async def test_a_retired_adapter_is_freed_after_its_last_answer() -> None:
    bench = Bench()
    bank = bench.engine.adapters
    bench.context.gate.clear()
    try:
        running = bench.submit([1, 2], A, max_tokens=5)
        await asyncio.to_thread(bench.context.entered.wait, 5)
        bench.engine.call(lambda: bank.retire("a"))
        bench.engine.call(lambda: bank.retire("b"))
        bench.context.gate.set()
        assert await running.text() == "3 4 5 6 7 "
        assert await bench.submit([9], PLAIN, max_tokens=1).text() == "10 "
        with pytest.raises(EngineError):
            await bench.submit([1, 2], A, max_tokens=1).text()
    finally:
        await bench.close()


def sequence(adaptation: Adaptation, prompt: int = 1, **options: Any) -> Sequence:
    mailbox: Any = Mock(spec=Mailbox)
    return Sequence(
        prompt=[1] * prompt, options=SamplingOptions(**options), mailbox=mailbox, adaptation=adaptation
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(ADAPTATIONS), st.integers(1, 300), st.booleans()), min_size=1, max_size=9
    )
)
def test_parties_take_fair_turns(arrivals: list[tuple[Adaptation, int, bool]]) -> None:
    scheduler = Scheduler(Budget.of(64))
    live = [sequence(one, prompt, deterministic=alone) for one, prompt, alone in arrivals]
    parties = {one.id if one.options.deterministic else one.adaptation for one in live}
    waited = dict.fromkeys(parties, 0)
    for _ in range(120):
        plan = scheduler.plan(live)
        assert len({chunk.sequence.adaptation for chunk in plan}) == 1
        served = {c.sequence.id if c.sequence.options.deterministic else c.sequence.adaptation for c in plan}
        assert len(served) == 1
        for party in parties:
            waited[party] = 0 if party in served else waited[party] + 1
            assert waited[party] <= TURN_STEPS * (len(parties) - 1)
        for chunk in plan:
            chunk.sequence.computed += chunk.count
            if chunk.completes:
                chunk.sequence.tokens.append(2)


def test_a_party_keeps_its_turn_for_tokens_but_not_for_prompts() -> None:
    scheduler = Scheduler(Budget(step=64, prompts_step=16, share=64))
    live = [sequence(A), sequence(B)]
    order = []
    for _ in range(16):
        (chunk,) = scheduler.plan(live)
        chunk.sequence.computed += 1
        chunk.sequence.tokens.append(2)
        order.append(chunk.sequence.adaptation.digest)
    assert "".join(order) == "aaaabbbbaaaabbbb"
    live = [sequence(A, 300), sequence(B, 300)]
    order = []
    for _ in range(4):
        (chunk,) = scheduler.plan(live)
        chunk.sequence.computed += chunk.count
        order.append(chunk.sequence.adaptation.digest)
    assert sorted(order) == ["a", "a", "b", "b"] and order[0] != order[1]
