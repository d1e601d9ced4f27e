"""Speculation changes the speed and nothing else: exact, on a model that does not round."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.runtime.sequence import Piece
from lichen.runtime.speculation.drafter import Drafter
from lichen.runtime.speculation.suffix import SuffixDrafter
from lichen.runtime.speculation.verify import verify
from tests.runtime.speculation.small_native import (
    END,
    VOCABULARY,
    SmallBench,
    SmallSampler,
    Told,
    likeliest,
    logits_after,
)

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "suffix": SuffixDrafter,
    "right at first": lambda: Told(lambda tokens: [*likeliest(tokens, 3), 0, 0]),
    "greedy": lambda: Told(likeliest),
    "liar": lambda: Told(lambda tokens: [(likeliest(tokens, 1)[0] + 1) % VOCABULARY] * 6),
    "ends too soon": lambda: Told(lambda tokens: [*likeliest(tokens, 1), END, 3, 4]),
}
Answer = tuple[str, str, int]  # text, why it ended, tokens


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("lichen.runtime.drawing.Sampler", SmallSampler)
    yield


def answers(requests: list[dict[str, Any]], drafters: list[Drafter], **size: int) -> tuple[list[Answer], Any]:
    """All requests at once over one engine, which is empty and in order afterwards."""
    bench = SmallBench(drafters, **size)

    async def ask(request: dict[str, Any]) -> Answer:
        generation = bench.submit(**request)
        text = await generation.text()
        assert generation.finished is not None
        timings = generation.finished.timings
        assert 0 <= timings.draft_n_accepted <= timings.draft_n
        return text, generation.finished.reason, generation.finished.usage.completion_tokens

    async def everyone() -> list[Answer]:
        got = await asyncio.gather(*(ask(request) for request in requests))
        await bench.settled()
        return got

    try:
        got = asyncio.run(everyone())
        counters = bench.engine.counters()
        for slot, held in bench.context.held.items():
            assert bench.engine._slots.tokens(slot) == held or not held
        assert counters.cells_used == sum(map(len, bench.context.held.values()))
        assert counters.completion_tokens == sum(count for _, _, count in got)
    finally:
        bench.engine.close()
    return got, counters


def test_the_rule_stops_at_the_first_difference_and_draws_once_more() -> None:
    def over(*draws: int | None) -> tuple[int, list[int]]:
        asked: list[int] = []

        def draw(position: int) -> int | None:
            asked.append(position)
            return draws[position]

        return verify([1, 2, 3], draw), asked

    assert over(1, 2, 3, 4) == (3, [0, 1, 2, 3])
    assert over(1, 7) == (1, [0, 1])
    assert over(9) == (0, [0])
    assert over(1, None) == (1, [0, 1])
    assert verify([], lambda _: 5) == 0


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.7, "seed": 1, "frequency_penalty": 1.0},
        {"temperature": 0, "logit_bias": {3: 4.0, END: -100.0}},
        {"temperature": 0, "logit_bias": {END: 6.0}},
        {"temperature": 0, "grammar": 7},
        {"temperature": 1.5, "seed": 3, "grammar": 12},
        {"temperature": 0, "stop": ("4 2", "7 ")},
        {"temperature": 1.2, "seed": 8, "stop": ("1 ",)},
        {"temperature": 0, "max_tokens": 1},
        {"temperature": 0, "max_tokens": 2},
        {"temperature": 0, "deterministic": True},
        {"temperature": 0, "top_logprobs": 2},
    ],
    ids=str,
)
def test_an_answer_is_what_plain_decoding_gives(drafter: str, options: dict[str, Any]) -> None:
    requests = [
        {"prompt": [start, start + 1, start], "max_tokens": 60, "logit_bias": {END: -4.0}} | options
        for start in range(4)
    ]
    plain, _ = answers(requests, [])
    drafted, counters = answers(requests, [DRAFTERS[drafter]()])
    assert drafted == plain
    if options.get("deterministic"):
        assert counters.draft_tokens == 0


def test_most_of_a_greedy_answer_comes_from_right_drafts() -> None:
    request: dict[str, Any] = {
        "prompt": [1, 2],
        "temperature": 0,
        "max_tokens": 64,
        "logit_bias": {END: -100.0},
    }
    plain, before = answers([request], [])
    drafted, after = answers([request], [Told(likeliest)])
    assert drafted == plain
    assert after.steps < before.steps / 4
    assert after.draft_accepted > 45


def test_a_request_may_do_without_while_its_neighbour_drafts() -> None:
    request: dict[str, Any] = {
        "prompt": [1, 2],
        "temperature": 0,
        "max_tokens": 40,
        "logit_bias": {END: -100.0},
    }
    bench = SmallBench([Told(likeliest)])

    async def both() -> tuple[Any, Any]:
        one, other = bench.submit(**request), bench.submit(**request, speculation=False)
        assert await one.text() == await other.text()
        return one.finished, other.finished

    try:
        one, other = asyncio.run(both())
    finally:
        bench.engine.close()
    assert one.timings.draft_n_accepted > 20
    assert other.timings.draft_n == 0


def test_an_answer_never_passes_the_end_of_the_context() -> None:
    request: dict[str, Any] = {"prompt": [1, 2], "temperature": 0, "logit_bias": {END: -100.0}}
    (answer,), _ = answers([request], [Told(likeliest)], context=32)
    assert answer[1:] == ("length", 30)


def test_a_context_that_cannot_be_cut_computes_again_and_drafts_no_more() -> None:
    request: dict[str, Any] = {
        "prompt": [1, 2],
        "temperature": 0,
        "max_tokens": 30,
        "logit_bias": {END: -100.0},
    }
    plain, _ = answers([request], [])
    bench = SmallBench([DRAFTERS["liar"]()])
    bench.context.cuttable = False

    async def ask() -> str:
        return await bench.submit(**request).text()

    try:
        assert asyncio.run(ask()) == plain[0][0]
        assert bench.engine.counters().drafts == 1
    finally:
        bench.engine.close()


def test_a_step_never_computes_more_than_the_context_can() -> None:
    """Eight sequences that all draft six tokens, in steps of ten: the fake context asserts its bounds."""
    requests = [
        {"prompt": [n], "temperature": 0, "max_tokens": 20, "logit_bias": {END: -100.0}} for n in range(8)
    ]
    plain, _ = answers(requests, [], slots=8, batch=10)
    drafted, _ = answers(requests, [Told(likeliest)], slots=8, batch=10)
    assert drafted == plain


REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, END - 1), min_size=1, max_size=24),
        "max_tokens": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 0.8, 2.0]),
        "seed": st.integers(0, 1 << 32),
        "presence_penalty": st.sampled_from([0.0, 1.0, -1.0]),
        "stop": st.sampled_from([(), ("3 ",), ("1 2", "0 0")]),
        "logit_bias": st.dictionaries(st.integers(0, END), st.floats(-5, 5), max_size=3),
        "grammar": st.sampled_from([0, 0, 5]),
        "speculation": st.booleans(),
        "deterministic": st.sampled_from([False, False, False, True]),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(REQUEST, min_size=1, max_size=6), st.sampled_from(sorted(DRAFTERS)))
def test_whatever_is_asked_together_nothing_changes(requests: list[dict[str, Any]], drafter: str) -> None:
    plain, _ = answers(requests, [])
    drafted, _ = answers(requests, [DRAFTERS[drafter]()])
    assert drafted == plain


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(REQUEST, st.integers(0, 6)), min_size=1, max_size=8))
def test_cancelled_in_the_middle_of_drafts_everything_comes_free(
    requests: list[tuple[dict[str, Any], int]],
) -> None:
    bench = SmallBench([Told(likeliest)])

    async def ask(request: dict[str, Any], read: int) -> None:
        generation = bench.submit(**request)
        while read and not generation.done:
            read -= isinstance(await generation.next(None), Piece)
        generation.close()

    async def everyone() -> None:
        await asyncio.gather(*(ask(*request) for request in requests))
        await bench.settled()

    try:
        asyncio.run(everyone())
        counters = bench.engine.counters()
        assert (counters.running, counters.waiting, counters.free_slots) == (0, 0, 3)
        assert counters.cells_used == sum(map(len, bench.context.held.values()))
    finally:
        bench.engine.close()


def test_draws_follow_the_models_own_distribution() -> None:
    """Chi-square over 24,000 tokens drawn at temperature 1 behind drafts that are often right.

    Each pair of tokens has a distribution of its own; those of the commonest pairs are tested together.
    """
    requests: list[dict[str, Any]] = [
        {
            "prompt": [n % END, n % 7],
            "temperature": 1.0,
            "seed": n,
            "max_tokens": 80,
            "logit_bias": {END: -100.0},
        }
        for n in range(300)
    ]
    bench = SmallBench([Told(likeliest)], slots=8, batch=32)

    async def everyone() -> list[list[int]]:
        found = []
        for begin in range(0, len(requests), 50):
            generations = [bench.submit(**request) for request in requests[begin : begin + 50]]
            for generation in generations:
                await generation.text()
                found.append(generation.sequence.tokens)
        return found

    try:
        texts = asyncio.run(everyone())
        assert bench.engine.counters().draft_accepted > 3000
    finally:
        bench.engine.close()
    seen: dict[tuple[int, int], Counter[int]] = {}
    for tokens in texts:
        for one, two, three in zip(tokens, tokens[1:], tokens[2:], strict=False):
            seen.setdefault((one, two), Counter())[three] += 1
    drawn = sum(sum(counts.values()) for counts in seen.values())
    assert drawn >= 20_000
    statistic, degrees = 0.0, 0
    for pair, counts in seen.items():
        row = logits_after(pair).astype(np.float64)
        row[END] -= 100.0
        expected = np.exp(row - row.max())
        expected *= sum(counts.values()) / expected.sum()
        common = [token for token in range(VOCABULARY) if expected[token] >= 5]
        rest = sum(expected[token] for token in range(VOCABULARY) if token not in common)
        if len(common) < 2:
            continue
        statistic += sum((counts[token] - expected[token]) ** 2 / expected[token] for token in common)
        if rest >= 5:
            others = sum(count for token, count in counts.items() if token not in common)
            statistic += (others - rest) ** 2 / rest
        degrees += len(common) - (rest < 5)
    # The normal approximation of the chi-square distribution (Wilson and Hilferty): p >= 0.01 below 2.326.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    print(f"chi-square {statistic:.0f} with {degrees} degrees of freedom over {drawn} draws, z = {z:.2f}")
    assert z < 2.326
