"""Cuts that cover everything, and pieces that are each done once."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.quant.shares import diminishing, share_out


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20), st.integers(1, 256))
def test_cuts_cover_everything_in_few_pieces_that_shrink(total: int, least: int, threads: int) -> None:
    cuts = diminishing(total, max(least, total >> 12), threads)
    sizes = [after - before for before, after in itertools.pairwise(cuts)]
    assert (cuts[0], cuts[-1]) == (0, total)
    assert sizes == sorted(sizes, reverse=True)
    assert all(size >= min(least, total) for size in sizes[:-1])
    assert not sizes or sizes[0] <= max(least, total >> 12, total // (2 * threads), 1)
    assert len(sizes) <= 4096 + 2 * threads


def test_nothing_has_no_pieces() -> None:
    assert diminishing(0, 5, 2) == [0]
    assert diminishing(3, 0, 2) == [0, 1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2, 7, None])
def test_each_piece_is_done_once_and_the_first_failure_is_told(threads: int | None) -> None:
    done: list[int] = []
    share_out(50, done.append, threads)
    assert sorted(done) == list(range(50))

    def work(piece: int) -> None:
        if piece in (7, 9):
            raise ValueError(str(piece))

    with pytest.raises(ValueError, match="7"):
        share_out(50, work, threads)


def test_the_caller_works_too() -> None:
    seen: set[int] = set()
    share_out(1, lambda _: seen.add(threading.get_ident()), 4)
    assert seen == {threading.get_ident()}
