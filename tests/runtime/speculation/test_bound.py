"""What `bench.speculation` computes of measured costs and answers, where the result is known beforehand."""

from __future__ import annotations

import pytest

from bench.speculation_bound import Guess, acceptance, attainable, curve_of, guesses, memory_bound

DEAR = curve_of({1: 0.01, 2: 0.02, 17: 0.17})  # every token costs a step
HALF = curve_of({1: 0.01, 17: 0.09})  # every further one half a step


def certain(count: int, length: int = 16) -> list[Guess]:
    """An answer of which every guess comes true, up to its end."""
    return [Guess("sure", length, min(length, count - at)) for at in range(count)]


def test_a_curve_goes_through_what_was_measured_and_on() -> None:
    assert [HALF(width) for width in (1, 2, 9, 17, 33)] == pytest.approx([1.0, 1.5, 5.0, 9.0, 17.0])


def test_where_a_token_costs_a_step_nothing_can_be_won() -> None:
    assert attainable([certain(200)], DEAR) == pytest.approx(1.0)


def test_lies_are_left_out() -> None:
    lies = [Guess("lie", 16, 0)] * 100
    assert attainable([lies], HALF) == 1.0
    assert attainable([lies, certain(102)], HALF) == pytest.approx(202 / (100 + 6 * 9), rel=0.02)


def test_certain_drafts_come_near_to_the_rate_of_the_widest_step() -> None:
    assert attainable([certain(1700)], HALF) == pytest.approx(17 / 9, rel=0.02)
    assert attainable([certain(1700)], memory_bound) == pytest.approx(8.0, rel=0.02)


async def test_a_text_that_repeats_itself_is_guessed() -> None:
    tokens = [*range(100, 140), *range(100, 140)]
    found = guesses(tokens, 40)
    assert len(found) == 39
    assert all(guess.right == guess.length for guess in found)
    assert found[20].length == 16
    shares = acceptance([found])
    assert all(share == 1.0 for kind, row in shares.items() for share in row[:3] if kind.endswith("4"))
