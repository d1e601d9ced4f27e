"""The scheduler by property and by simulation: budgets hold, nobody starves."""

from __future__ import annotations

from collections import deque
from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from lichen.devices.intent import Intent
from lichen.runtime.admission import line_up
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
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 900)), min_size=1, max_size=12),
    st.integers(16, 256),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_budgets_hold_and_each_prompt_delays_a_stream_by_at_most_its_share(
    arrivals: list[tuple[int, int]], step: int, prompts_step: int, share: int
) -> None:
    budget = Budget(step=step, prompts_step=min(prompts_step, step), share=min(share, step))
    scheduler = Scheduler(budget)
    live: list[Sequence] = []
    between = 0  # prompt tokens since the streams had their last token
    waited: set[int] = set()  # prompts that waited since then
    for turn in range(40):
        live += [sequence(count) for when, count in arrivals if when == turn]
        streams = {s.id for s in live if s.drawn}
        prompts = {s.id for s in live} - streams
        computed = advance(scheduler, live)
        assert sum(computed.values()) <= step
        assert bool(computed) == bool(live), "whoever is there advances"
        tokens = sum(count for key, count in computed.items() if key in prompts)
        if streams and prompts:
            waited |= prompts
            between += tokens
            assert between <= budget.share * len(waited) + 1
        if not prompts or streams & computed.keys():
            between, waited = 0, set()


def test_a_burst_of_prompts_is_through_before_the_streams_go_on() -> None:
    scheduler = Scheduler(Budget(step=256, prompts_step=64, share=64))
    stream = sequence(1)
    advance(scheduler, [stream])
    live = [stream, *(sequence(40) for _ in range(8))]
    steps = [advance(scheduler, live) for _ in range(5)]
    assert all(stream.id not in step for step in steps[:4])
    assert all(s.drawn for s in live)
    assert stream.id in advance(scheduler, live)


def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones() -> None:
    scheduler = Scheduler(Budget(step=64, prompts_step=64, share=64))
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
    scheduler = Scheduler(Budget(step=64, prompts_step=64, share=64))
    long, short = sequence(4000), sequence(20)
    assert advance(scheduler, [long, short]) == {short.id: 20, long.id: 44}


def test_nothing_live_plans_nothing() -> None:
    assert Scheduler(Budget(step=8, prompts_step=8, share=8)).plan([]) == []


def wanting(intent: Intent, prompt_tokens: int) -> Sequence:
    options = SamplingOptions(intent=intent)
    return Sequence(prompt=[1] * prompt_tokens, options=options, mailbox=Mock(spec=Mailbox))


def test_latency_goes_ahead_and_throughput_lets_go_ahead() -> None:
    scheduler = Scheduler(Budget(step=256, prompts_step=64, share=64))
    patient, plain, urgent = wanting("throughput", 64), wanting("balanced", 64), wanting("latency", 500)
    live = [patient, plain, urgent]
    order = []
    for _ in range(20):
        step = advance(scheduler, live)
        order += [one for one in live if one.id in step and one.drawn == 1 and one not in order]
    assert order == [urgent, plain, patient]


def test_an_urgent_prompt_takes_whole_steps_and_a_patient_one_small_chunks() -> None:
    sizes = {}
    wanted: tuple[Intent, ...] = ("latency", "balanced", "battery")
    for intent in wanted:
        scheduler = Scheduler(Budget(step=256, prompts_step=64, share=64))
        stream = sequence(1)
        advance(scheduler, [stream])
        prompt = wanting(intent, 1000)
        sizes[intent] = max(advance(scheduler, [stream, prompt]).get(prompt.id, 0) for _ in range(4))
    assert sizes == {"latency": 256, "balanced": 64, "battery": 16}


@given(st.lists(st.sampled_from(("latency", "balanced", "throughput")), min_size=2, max_size=8))
def test_intents_never_starve_anybody(intents: list[Intent]) -> None:
    """Urgent prompts come without end; everybody who was there first is through within a bounded time."""
    scheduler = Scheduler(Budget(step=256, prompts_step=64, share=64))
    first = [wanting(intent, 200) for intent in intents]
    live = list(first)
    for _ in range(200):
        if sum(one.options.intent == "latency" and not one.drawn for one in live) < 2:
            live.append(wanting("latency", 200))
        advance(scheduler, live)
        live = [one for one in live if not one.drawn or one in first]
        if all(one.drawn for one in first):
            return
    raise AssertionError([one.remaining for one in first])


def test_the_queue_is_by_age_after_what_intents_are_given() -> None:
    waiting: deque[Sequence] = deque()
    old, patient, urgent, later = (
        wanting("balanced", 1), wanting("throughput", 1), wanting("latency", 1), wanting("balanced", 1)
    )  # fmt: skip
    line_up(waiting, [old, patient])
    line_up(waiting, [urgent, later])
    assert list(waiting) == [urgent, old, later, patient]
    newest = wanting("balanced", 1)
    newest.submitted_at += 30
    line_up(waiting, [newest])
    assert waiting[-1] is newest, "who waited long enough is not passed any more"
