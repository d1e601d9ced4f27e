"""The scheduler by property and by simulation: budgets hold, nobody starves."""

from __future__ import annotations

from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from lichen.runtime.generation import Mailbox
from lichen.runtime.scheduler import Budget, Scheduler
from lichen.runtime.sequence import SamplingOptions, Sequence


def sequence(prompt_tokens: int) -> Sequence:
    return Sequence(prompt=[1] * prompt_tokens, options=SamplingOptions(), mailbox=Mock(spec=Mailbox))


def advance(scheduler: Scheduler, live: list[Sequence]) -> dict[int, int]:
    """Carry out one planned step as the engine would; tokens computed by sequence id."""
    plan = scheduler.plan(live)
    for chunk in plan:
        assert chunk.start == chunk.sequence.computed
        chunk.sequence.computed += chunk.count
        if chunk.completes:
            chunk.sequence.tokens.append(2)
    assert len({chunk.sequence.id for chunk in plan}) == len(plan), "one chunk a sequence"
    return {chunk.sequence.id: chunk.count for chunk in plan}


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=12),
    st.integers(16, 256),
    st.integers(1, 64),
    st.integers(1, 40),
)
def test_budgets_hold_and_decoding_sequences_always_advance(
    prompts: list[int], step: int, prefill: int, steps: int
) -> None:
    scheduler = Scheduler(Budget(step=step, prefill_while_decoding=prefill))
    live = [sequence(count) for count in prompts]
    for _ in range(steps):
        decoding = {s.id for s in live if s.drawn}
        waiting = len(live) - len(decoding)
        computed = advance(scheduler, live)
        assert 0 < sum(computed.values()) <= step
        assert decoding <= computed.keys()
        if decoding:
            assert sum(count for key, count in computed.items() if key not in decoding) <= prefill * waiting


def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones() -> None:
    scheduler = Scheduler(Budget(step=64, prefill_while_decoding=64))
    long = sequence(1000)
    live = [long]
    for _ in range(1, 1000 // 64 * 4):  # waiting must raise its rank in time
        live = [s for s in live if s is long or not s.drawn]
        live.append(sequence(64))  # a new short prompt arrives in every step and would fill it alone
        advance(scheduler, live)
        if long.drawn:
            break
    assert long.drawn


def test_short_prompts_pass_a_long_one_that_came_before() -> None:
    scheduler = Scheduler(Budget(step=64, prefill_while_decoding=64))
    long, short = sequence(4000), sequence(20)
    assert advance(scheduler, [long, short]) == {short.id: 20, long.id: 44}


def test_nothing_live_plans_nothing() -> None:
    assert Scheduler(Budget(step=8, prefill_while_decoding=8)).plan([]) == []
