"""The generator of the crossing matrix keeps its promise, for any axes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.covering import covering, parts

axes_of_any_kind = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2),
    st.lists(st.text("xyz", max_size=3), min_size=1, max_size=4, unique=True),
    min_size=3,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(axes=axes_of_any_kind, strength=st.integers(1, 3))
def test_every_choice_of_values_occurs(axes: dict[str, list[str]], strength: int) -> None:
    rows = covering(axes, strength=strength)
    for row in rows:
        assert list(row) == list(axes)
        assert all(row[axis] in values for axis, values in axes.items())
    for part in parts(axes, strength):
        assert any(part <= set(row.items()) for row in rows), f"{part} is missing"
    assert rows == covering(axes, strength=strength), "the same list each time"
    assert len({tuple(row.items()) for row in rows}) == len(rows)


def test_it_is_much_shorter_than_all_combinations() -> None:
    axes = {f"axis {number}": ["0", "1", "2"] for number in range(8)}
    assert len(covering(axes)) < 25 < 3**8


@pytest.mark.parametrize("axes", [{"one": ["a"]}, {"one": ["a"], "two": []}])
def test_axes_that_cannot_be_paired_are_refused(axes: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="axes"):
        covering(axes)
