"""After a promotion: what living with an adapter shows, and when it goes back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.adapters.watch import FEWEST_RATED, Bounds, Lived, watch

BOUNDS = Bounds()
COUNTS = st.integers(0, 10_000)


def lived(mean: float, count: int = 200, spread: float = 0.5, seed: int = 0, **counts: int) -> Lived:
    """A time with answers of that mean loss."""
    source = random.Random(seed)
    losses = [source.gauss(mean, spread) for _ in range(count)]
    return Lived(answers=count, loss=sum(losses), squares=sum(loss * loss for loss in losses), **counts)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (lived(1, up=90, down=10), lived(1, seed=1, up=60, down=40), "rated down"),
        (lived(1), lived(1.5, seed=1), "loss"),
        (lived(1, drafted=1000, accepted=600), lived(1, drafted=1000, accepted=300), "drafted"),
    ],
)
def test_a_bad_turn_goes_back(before: Lived, now: Lived, words: str) -> None:
    turn = watch(before, now, BOUNDS)
    assert turn.decision == "back" and words in turn.reasons[0] and len(turn.reasons) == 1
    assert watch(now, before, BOUNDS).decision == "stay"  # the other way round it is an improvement


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (Lived(), Lived()),
        (Lived(), lived(9, up=0, down=50)),  # nothing to compare with
        (lived(1, up=9, down=1), lived(1, seed=1, up=0, down=1)),  # one angry click proves nothing
        (lived(1, up=90, down=10), lived(1.05, seed=1, up=88, down=12)),
        (lived(1, count=3), lived(2, count=3, seed=1, spread=2)),
        (Lived(up=500), Lived(down=FEWEST_RATED - 1)),  # one person's mood
    ],
)
def test_chance_and_little_change_stay(before: Lived, now: Lived) -> None:
    assert watch(before, now, BOUNDS).decision == "stay"


def test_five_ratings_are_enough_where_all_of_them_changed_sides() -> None:
    turn = watch(Lived(up=5), Lived(down=FEWEST_RATED), BOUNDS)
    assert turn.decision == "back" and "rated down" in turn.reasons[0]
    assert watch(Lived(up=3, down=2), Lived(up=1, down=4), BOUNDS).decision == "stay"


def test_two_times_add_up() -> None:
    one, other = lived(1, seed=1, up=3, drafted=9), lived(2, seed=2, down=4, accepted=5)
    whole = one + other
    assert (whole.up, whole.down, whole.drafted, whole.accepted, whole.answers) == (3, 4, 9, 5, 400)
    assert whole.loss == one.loss + other.loss and whole.squares == one.squares + other.squares


@given(up=COUNTS, down=COUNTS, factor=st.integers(1, 50))
def test_the_same_life_again_is_never_a_bad_turn(up: int, down: int, factor: int) -> None:
    before = Lived(up=up, down=down, answers=up + 2, loss=up + 2.0, squares=2.0 * up + 4)
    more = Lived(
        up=up * factor,
        down=down * factor,
        answers=before.answers * factor,
        loss=before.loss * factor,
        squares=before.squares * factor,
    )
    assert watch(before, more, BOUNDS).decision == "stay"
