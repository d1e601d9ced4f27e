"""The allocator beside every possible choice, on problems small enough to try them all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.errors import ConfigError
from lichen.quant.allocate import Option, allocate, convex_hull
from lichen.quant.formats import GGMLType

A, B, C, D = GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0

options = st.lists(
    st.builds(Option, st.sampled_from([A, B, C, D]), st.integers(1, 60), st.integers(0, 1000).map(float)),
    min_size=1,
    max_size=4,
)
problems = st.dictionaries(st.sampled_from("pqrst"), options, min_size=1, max_size=4)


def least_cost(problem: dict[str, list[Option]], budget: int) -> float:
    return min(
        sum(option.cost for option in choice)
        for choice in itertools.product(*problem.values())
        if sum(option.bytes for option in choice) <= budget
    )


@given(problems, st.integers(0, 120))
def test_within_the_budget_and_off_by_less_than_one_step(
    problem: dict[str, list[Option]], extra: int
) -> None:
    budget = sum(min(option.bytes for option in choices) for choices in problem.values()) + extra
    chosen = allocate(problem, budget)
    assert chosen.keys() == problem.keys()
    assert all(chosen[name] in problem[name] for name in problem)
    assert sum(option.bytes for option in chosen.values()) <= budget
    # the relaxation that the walk solves is at most one step of one hull better than what it gives
    steps = [
        a.cost - b.cost for choices in problem.values() for a, b in itertools.pairwise(convex_hull(choices))
    ]
    best = least_cost(problem, budget)
    found = sum(option.cost for option in chosen.values())
    assert best - 1e-9 <= found <= best + max(steps, default=0.0) + 1e-9


@given(options)
def test_a_hull_is_convex_and_holds_the_best_of_any_price(choices: list[Option]) -> None:
    hull = convex_hull(choices)
    slopes = [(a.cost - b.cost) / (b.bytes - a.bytes) for a, b in itertools.pairwise(hull)]
    assert all(slope > 0 for slope in slopes)
    assert slopes == sorted(slopes, reverse=True)
    for price in (0.001, 0.1, 1.0):
        best = min(option.cost + price * option.bytes for option in choices)
        assert min(option.cost + price * option.bytes for option in hull) == pytest.approx(best)


def test_bits_go_where_they_save_most() -> None:
    dull = [Option(A, 10, 1.0), Option(B, 20, 0.9)]
    keen = [Option(A, 10, 1.0), Option(B, 20, 0.1)]
    chosen = allocate({"dull": dull, "keen": keen}, 30)
    assert (chosen["dull"].type, chosen["keen"].type) == (A, B)


def test_a_type_that_is_larger_and_worse_is_never_taken() -> None:
    chosen = allocate({"one": [Option(A, 10, 0.5), Option(B, 20, 0.6)]}, 1000)
    assert chosen["one"].type is A


def test_too_small_a_budget_says_the_smallest() -> None:
    with pytest.raises(ConfigError, match="smallest possible are 1,010"):
        allocate({"one": [Option(A, 1000, 1.0)], "two": [Option(A, 10, 1.0), Option(B, 20, 0.0)]}, 900)
