"""The controller in simulation: speculation never costs what it may not, and gets what there is to get."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.runtime.batch import micro_batches, runs_of
from lichen.runtime.sequence import Sequence
from lichen.runtime.speculation.control import INCOME, LOAN, Acceptance, Controller, Offer
from lichen.runtime.speculation.costs import StepCosts
from lichen.runtime.speculation.drafter import MAX_DRAFT
from tests.runtime.speculation.playing import (
    CURVES,
    Curve,
    Oracle,
    best_possible,
    copying,
    lying,
    play,
    through,
)

PROMISED = 0.98


@pytest.mark.parametrize("sequences", [1, 2, 4, 16])
@pytest.mark.parametrize("curve", CURVES)
def test_a_drafter_that_always_lies_costs_next_to_nothing(curve: str, sequences: int) -> None:
    speed, counters = play(CURVES[curve], [Oracle(lying)], sequences=sequences)
    assert speed >= PROMISED
    assert counters.draft_accepted == 0


@pytest.mark.parametrize("right", [0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("curve", CURVES)
def test_a_drafter_that_is_right_at_times_never_costs_what_it_may_not(curve: str, right: float) -> None:
    speed, _ = play(CURVES[curve], [Oracle(lambda _: right)])
    assert speed >= PROMISED


@pytest.mark.parametrize("curve", CURVES)
def test_a_drafter_that_copies_comes_near_to_the_best(curve: str) -> None:
    speed, _ = play(CURVES[curve], [Oracle(copying)])
    assert speed >= 0.9 * best_possible(CURVES[curve])


@pytest.mark.parametrize("curve", CURVES)
def test_a_drafter_that_turns_to_lying_is_left_soon(curve: str) -> None:
    def turning(sequence: Sequence) -> float:
        return float(sequence.drawn % 400 < 200)

    speed, _ = play(CURVES[curve], [Oracle(turning)], tokens=2000)
    half = 2 / (1 + 1 / best_possible(CURVES[curve]))
    assert speed >= max(PROMISED, 0.75 * half)


def test_one_of_four_sequences_drafts_and_the_others_wait_no_longer_than_allowed() -> None:
    def first_only(sequence: Sequence) -> float:
        return float(sequence.id % 4 == 0)

    speed, counters = play(CURVES["bound by memory"], [Oracle(first_only)], sequences=4)
    # Its own micro-batch of eight tokens costs a plain step; one token more of all four costs nothing here.
    assert speed >= 1.05
    assert counters.draft_accepted > 400, "of the thousand tokens that could be known"


F16 = through((1, 1.0), (4, 1.55), (8, 1.75), (16, 2.1), (32, 3.4), (64, 6.2))


@pytest.mark.parametrize("curve", [F16, *CURVES.values()])
@pytest.mark.parametrize("copies", [2, 16])
def test_sixteen_answers_of_which_some_copy_are_never_slower(curve: Curve, copies: int) -> None:
    """Drafts of some make micro-batches of their own, whose cost must not pass for that of plain steps."""

    def some(sequence: Sequence) -> float:
        return 0.9 if sequence.id % 16 < copies else 0.1

    speed, _ = play(curve, [Oracle(some)], sequences=16, tokens=[100 + 37 * at % 300 for at in range(16)])
    assert speed >= PROMISED


def test_what_drafts_add_is_not_taken_for_the_cost_of_plain_steps() -> None:
    costs = StepCosts()
    for turn in range(400):
        if turn % 4:
            costs.observe([16, 1, 1, 1, 1], 0.021 + 4 * 0.01, plain=False)
        else:
            costs.observe([16], 0.021)
    assert costs.seconds(16) == pytest.approx(0.021, rel=0.05)
    assert costs.seconds(1) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("slots", "lengths", "widths"),
    [
        ([0], [5], [5]),
        ([0, 1, 2, 3], [1, 1, 1, 1], [4]),
        ([0, 1, 2, 3], [1, 5, 1, 3], [4, 4, 2]),
        ([0, 1, 2, 3], [1, 5, 3, 1], [4, 4, 2]),
        ([0, 1, 2, 3], [3, 3, 3, 3], [12]),
        ([0, 2, 3], [1, 1, 1], [1, 2]),
        ([0, 2, 3], [4, 1, 2], [4, 2, 1]),
    ],
)
def test_a_step_falls_into_micro_batches(slots: list[int], lengths: list[int], widths: list[int]) -> None:
    assert micro_batches(slots, lengths) == widths
    assert runs_of(slots) == micro_batches(slots, [1] * len(slots))


def test_speculation_fades_as_the_batch_fills() -> None:
    curve = through((1, 1.0), (4, 1.1), (16, 4.0), (64, 16.0))
    drafted = [
        play(curve, [Oracle(copying)], sequences=n, tokens=300)[1].draft_tokens / n for n in (1, 4, 16)
    ]
    assert drafted[0] > drafted[1] > drafted[2]
    assert drafted[2] < 10


def test_what_cannot_pay_is_not_even_proposed() -> None:
    drafter = Oracle(copying)
    play(CURVES["no gain at all"], [drafter])
    assert drafter.proposed < 150, "in a thousand steps"


def test_a_drafter_that_costs_time_is_used_only_where_that_pays() -> None:
    cheap, dear = (play(CURVES["bound by memory"], [Oracle(copying, token_s=s)]) for s in (0.0005, 0.02))
    assert cheap[0] > 2.0
    assert dear[0] >= PROMISED
    assert dear[1].draft_tokens < 50


def test_of_two_drafters_the_better_one_is_taken() -> None:
    liar, knower = Oracle(lying), Oracle(copying, token_s=0.0002)
    knower.name = "knower"
    speed, _ = play(CURVES["bound by memory"], [liar, knower])
    assert speed > 4.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=40, max_size=40),
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_whatever_machine_and_drafter_the_loss_is_bounded(
    rises: list[float], rights: list[float], sequences: int, seed: int
) -> None:
    """Cost curves that rise by at most a plain step a token, acceptance that changes every 50 tokens."""
    heights = [1.0]
    for rise in rises:
        heights.append(heights[-1] + rise)

    def right(sequence: Sequence) -> float:
        return rights[sequence.drawn // 50 % len(rights)]

    tokens = 600
    speed, _ = play(
        lambda width: heights[width - 1], [Oracle(right, seed)], sequences=sequences, tokens=tokens, noise=0.0
    )
    surprise = MAX_DRAFT  # plain steps: the first step of a width may cost more than it was taken for
    assert 1 / speed <= 1 + 2 * INCOME + (LOAN + surprise) / tokens


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-4, 10.0), min_size=1), st.integers(1, 64))
def test_costs_never_fall_with_width_and_lie_between_what_was_measured(
    measured: dict[int, float], width: int
) -> None:
    costs = StepCosts()
    for at, seconds in measured.items():
        costs.observe([at], seconds)
    curve = [costs.seconds(w) for w in range(1, 65)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(curve))
    assert all(math.isfinite(value) and value > 0 for value in curve)


def test_before_the_first_step_nothing_is_known_and_nothing_drafted() -> None:
    controller = Controller()
    assert controller.costs.seconds(1) == 0.0
    assert controller.allowance([1], 16) == 0
    assert controller.lengths([1], [Offer([1.0] * 16)], 16) == [0]


def test_a_machine_that_slows_down_as_a_whole_keeps_its_ratios() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.observe([1], 0.01)
        costs.observe([8], 0.02)
    for step in range(600):
        costs.observe([1], 0.01 * (1 + step / 300))
    assert 1.4 < costs.seconds(8) / costs.seconds(1) < 2.4


def test_a_width_that_was_dear_once_is_tried_again_in_time() -> None:
    """Wide steps were measured while another program ran; nothing else would ever correct that."""
    controller = Controller()
    for _ in range(20):
        controller.costs.observe([1], 0.01)
        controller.costs.observe([8], 0.2)
    assert controller.allowance([1], 7) == 0
    for _ in range(4000):
        controller.stepped([1], [1], 1, 0.01, 0.01)
    assert controller.allowance([1], 7) > 0


def test_a_width_that_became_dear_alone_is_seen_as_such() -> None:
    costs = StepCosts()
    for turn in range(60):
        costs.observe([1], 0.01)
        costs.observe([8], 0.02 if turn < 20 else 0.06)
    assert costs.seconds(8) / costs.seconds(1) > 4


@given(st.integers(0, 1 << 30), st.floats(0.05, 0.95))
@settings(max_examples=25)
def test_acceptance_is_learned_and_its_chances_never_rise_with_position(seed: int, right: float) -> None:
    chance, record = random.Random(seed), Acceptance()
    for step in range(200):
        accepted = 0
        while accepted < 4 and chance.random() < right:
            accepted += 1
        record.observe(min(accepted + 1, 4), accepted, step)
    chances = record.chances(MAX_DRAFT, 200)
    assert all(a >= b for a, b in itertools.pairwise(chances))
    assert abs(chances[0] - right) < 0.35


def test_a_sequence_starts_from_its_kind_and_then_goes_its_own_way() -> None:
    kind = Acceptance()
    for step in range(50):
        kind.observe(4, 4, step)
    own = Acceptance(kind)
    assert own.chances(1, 50)[0] > 0.9
    for step in range(50, 60):
        own.observe(1, 0, step)
    assert own.chances(1, 60)[0] < 0.6 < kind.chances(1, 60)[0]


def test_what_was_learned_long_ago_counts_less() -> None:
    record = Acceptance()
    for step in range(30):
        record.observe(1, 0, step)
    assert record.chances(1, 30)[0] < record.chances(1, 20_000)[0]
