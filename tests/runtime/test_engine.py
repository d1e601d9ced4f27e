"""The engine's bookkeeping over a counting stand-in for llama.cpp."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.errors import ContextOverflow, EngineError, QueueFull, RequestError, Unavailable
from lichen.runtime.engine import Engine
from lichen.runtime.generation import Generation, Mailbox
from lichen.runtime.native import DECODE_NO_KV_SLOT
from lichen.runtime.sequence import Piece, Prefill, SamplingOptions, Sequence
from tests.runtime.fake_native import END, CountingContext, CountingModel, CountingSampler


class Bench:
    """An engine over a counting context, and short ways to use it."""

    def __init__(self, queue_limit: int = 8, **size: int) -> None:
        self.context = CountingContext(**size)
        model: Any = CountingModel()
        context: Any = self.context
        self.engine = Engine(model, context, queue_limit=queue_limit)

    def submit(self, prompt: list[int], **options: Any) -> Generation:
        mailbox = Mailbox()
        sequence = Sequence(prompt=prompt, options=SamplingOptions(**options), mailbox=mailbox)
        self.engine.submit(sequence)
        return Generation(sequence, mailbox, self.engine.cancel)

    async def settled(self) -> None:
        """Wait until nothing runs or waits."""
        for _ in range(400):
            counters = self.engine.counters()
            if not counters.running and not counters.waiting:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"still busy: {counters}")

    async def waiting(self, count: int) -> None:
        for _ in range(400):
            if self.engine.counters().waiting == count:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"{self.engine.counters()}")


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.runtime.drawing.Sampler", CountingSampler)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.context.gate.set()
    await asyncio.to_thread(bench.engine.close)
    assert bench.context.closed


async def test_an_answer_its_usage_and_its_reason(bench: Bench) -> None:
    generation = bench.submit([1, 2, 3], max_tokens=4)
    assert await generation.text() == "4 5 6 7 "
    assert generation.finished is not None
    assert generation.finished.reason == "length"
    usage = generation.finished.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 4, 0)


async def test_the_models_end_token_is_not_shown(bench: Bench) -> None:
    generation = bench.submit([96])
    assert await generation.text() == "97 98 "
    assert generation.finished is not None
    assert generation.finished.reason == "stop"
    assert generation.finished.usage.completion_tokens == END - 96


async def test_a_stop_string_over_tokens_ends_the_answer(bench: Bench) -> None:
    generation = bench.submit([1], stop=("3 4",))
    assert await generation.text() == "2 "
    assert generation.finished is not None
    assert generation.finished.reason == "stop"


async def test_the_context_ends_an_answer_without_limit(bench: Bench) -> None:
    generation = bench.submit([1])
    await generation.text()
    assert generation.finished is not None
    assert generation.finished.reason == "length"
    assert generation.finished.usage.completion_tokens == bench.context.context - 1


async def test_a_long_prompt_goes_in_chunks_and_tells_its_progress(bench: Bench) -> None:
    generation = bench.submit(list(range(20)), max_tokens=1)
    events = [event async for event in generation]
    assert [event for event in events if isinstance(event, Prefill)] == [Prefill(8, 20), Prefill(16, 20)]
    assert [len(batch) for batch in bench.context.batches] == [8, 8, 4]


async def test_the_same_beginning_is_not_computed_twice(bench: Bench) -> None:
    await bench.submit([1, 2, 3, 4, 5], max_tokens=2).text()
    second = bench.submit([1, 2, 3, 4, 5, 6, 7], max_tokens=1)
    await second.text()
    assert second.finished is not None
    assert second.finished.usage.cached_tokens == 6  # the prompt, and the answer's first token


async def test_a_shared_beginning_under_way_is_waited_for_and_copied() -> None:
    bench = Bench(slots=2, context=256, batch=16)
    try:
        shared = [7] * 100
        first, second = bench.submit([*shared, 1], max_tokens=30), bench.submit([*shared, 2], max_tokens=3)
        await asyncio.gather(first.text(), second.text())
        assert second.finished is not None
        assert second.finished.usage.cached_tokens == 100
        assert sum(map(len, bench.context.batches)) < 101 + 1 + 30 + 3
    finally:
        await asyncio.to_thread(bench.engine.close)


async def test_prompts_that_cannot_fit_are_refused_with_both_numbers(bench: Bench) -> None:
    with pytest.raises(ContextOverflow, match="64 tokens, but the context holds 64"):
        bench.submit([1] * 64)
    assert bench.engine.counters().requests == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * 2000,)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
    ],
)
async def test_options_out_of_range_are_named(bench: Bench, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        bench.submit([1], **options)
    assert caught.value.param == field


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    bench = Bench(slots=1, queue_limit=2)
    bench.context.gate.clear()
    try:
        kept = [bench.submit([1], max_tokens=1) for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            bench.submit([1])
        assert caught.value.retry_after >= 1
        assert bench.engine.counters().rejected == 1
        bench.context.gate.set()
        assert [await generation.text() for generation in kept] == ["2 "] * 3
        await bench.submit([1], max_tokens=1).text()
    finally:
        await asyncio.to_thread(bench.engine.close)


async def test_cancelling_a_queued_sequence_frees_its_place() -> None:
    bench = Bench(slots=1)
    try:
        bench.context.gate.clear()
        running = bench.submit([1], max_tokens=2)
        await asyncio.to_thread(bench.context.entered.wait, 5)
        queued = bench.submit([5], max_tokens=2)
        queued.close()
        bench.context.gate.set()
        assert await running.text() == "2 3 "
        await bench.settled()
        assert bench.engine.counters().cancelled == 1
        assert all(5 not in [token for token, _, _ in batch] for batch in bench.context.batches)
    finally:
        await asyncio.to_thread(bench.engine.close)


async def test_cancelling_in_the_middle_of_a_prefill_stops_it_at_the_next_step(bench: Bench) -> None:
    bench.context.gate.clear()
    generation = bench.submit(list(range(40)))
    await asyncio.to_thread(bench.context.entered.wait, 5)
    generation.close()
    bench.context.gate.set()
    await bench.settled()
    assert len(bench.context.batches) == 1, "only the step that was under way"
    assert bench.engine.counters().free_slots == 2


async def test_cancelling_while_decoding_frees_the_slot_at_the_next_step(bench: Bench) -> None:
    bench.context.pace = 0.02
    generation = bench.submit([1])
    async for event in generation:
        if isinstance(event, Piece):
            break
    generation.close()
    generation.close()
    await bench.settled()
    counters = bench.engine.counters()
    assert (counters.cancelled, counters.free_slots) == (1, 2)


async def test_dropping_a_generation_cancels_it(bench: Bench) -> None:
    bench.context.pace = 0.02
    async for event in bench.submit([1]):
        if isinstance(event, Piece):
            break
    await bench.settled()
    assert bench.engine.counters().cancelled == 1


async def test_cancelling_the_reading_task_cancels_the_sequence(bench: Bench) -> None:
    bench.context.gate.clear()
    task = asyncio.ensure_future(bench.submit([1]).text())
    await asyncio.sleep(0.01)
    task.cancel()
    bench.context.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.settled()
    assert bench.engine.counters().cancelled == 1


@pytest.mark.parametrize("code", [-3, -1, 2, DECODE_NO_KV_SLOT])
async def test_a_failed_decode_goes_to_its_sequences_and_the_engine_recovers(bench: Bench, code: int) -> None:
    bench.context.codes = [code]
    with pytest.raises(EngineError, match="could not compute"):
        await bench.submit([1, 2]).text()
    assert await bench.submit([1, 2], max_tokens=2).text() == "3 4 "
    assert bench.engine.state == "running"
    assert bench.engine.counters().failed == 1


async def test_an_engine_that_cannot_recover_tells_everyone_who_waits() -> None:
    bench = Bench(slots=1)
    try:
        bench.context.gate.clear()
        generations = [bench.submit([1]) for _ in range(3)]
        bench.context.codes = [-3, -3]
        bench.context.gate.set()
        for generation in generations:
            with pytest.raises(EngineError):
                await generation.text()
        assert bench.engine.state == "failed"
        with pytest.raises(EngineError, match="could not recover"):
            bench.submit([1])
    finally:
        await asyncio.to_thread(bench.engine.close)


async def test_a_defect_in_the_engine_leaves_nobody_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingSampler, "sample", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await bench.submit([1]).text()
    with pytest.raises(EngineError):
        bench.submit([1])


async def test_draining_finishes_what_runs_and_takes_nothing_new(bench: Bench) -> None:
    bench.context.gate.clear()
    running = bench.submit([1], max_tokens=3)
    drained = asyncio.ensure_future(asyncio.to_thread(bench.engine.drain, 10.0))
    while bench.engine.state != "draining":
        await asyncio.sleep(0.001)
    with pytest.raises(Unavailable):
        bench.submit([1])
    bench.context.gate.set()
    assert await running.text() == "2 3 4 "
    assert await drained is True


async def test_draining_cuts_at_the_deadline_with_an_error(bench: Bench) -> None:
    bench.context.gate.clear()
    running = bench.submit([1])
    threading.Timer(0.3, bench.context.gate.set).start()
    assert await asyncio.to_thread(bench.engine.drain, 0.05) is False
    with pytest.raises(Unavailable, match="before this answer was complete"):
        await running.text()


async def test_closing_ends_what_runs_and_is_idempotent(bench: Bench) -> None:
    bench.context.gate.clear()
    running = bench.submit([1])
    threading.Timer(0.1, bench.context.gate.set).start()
    await asyncio.to_thread(bench.engine.close)
    await asyncio.to_thread(bench.engine.close)
    with pytest.raises(Unavailable):
        await running.text()


def test_loops_of_several_threads_share_one_engine() -> None:
    bench = Bench(slots=2)
    answers: list[str] = []

    async def ask() -> None:
        answers.append(await bench.submit([1], max_tokens=5).text())

    threads = [threading.Thread(target=lambda: asyncio.run(ask())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    bench.engine.close()
    assert answers == ["2 3 4 5 6 "] * 6


def test_a_loop_that_is_gone_does_not_disturb_the_others() -> None:
    bench = Bench()

    async def leave() -> Generation:
        return bench.submit([1])

    left = asyncio.run(leave())
    assert asyncio.run(asyncio.wait_for(_text(bench), 10)) == "2 "
    left.close()
    bench.engine.close()


async def _text(bench: Bench) -> str:
    return await bench.submit([1], max_tokens=1).text()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=24)
)
def test_whatever_happens_the_engine_ends_empty(requests: list[tuple[int, int, int]]) -> None:
    """Random prompts, lengths and cancellations: every counter returns to zero, every answer is right."""
    bench = Bench(slots=3, queue_limit=64)

    async def ask(size: int, limit: int, read: int) -> None:
        generation = bench.submit(list(range(1, size + 1)), max_tokens=limit)
        if read >= limit:
            expected = "".join(f"{size + 1 + n} " for n in range(limit) if size + 1 + n < END)
            assert await generation.text() == expected
            return
        seen = 0
        while seen < read and not generation.done:
            seen += isinstance(await generation.next(None), Piece)
        generation.close()

    async def everyone() -> None:
        await asyncio.gather(*(ask(*request) for request in requests))
        await bench.settled()

    asyncio.run(everyone())
    counters = bench.engine.counters()
    bench.engine.close()
    assert (counters.running, counters.waiting, counters.free_slots) == (0, 0, 3)
    assert counters.completed + counters.cancelled == counters.requests == len(requests)
    assert bench.engine._admission.count == 0
