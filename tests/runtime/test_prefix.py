"""The radix tree against the obvious linear search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lichen.runtime.prefix import PrefixTree, shared_prefix


def common(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


TOKENS = st.lists(st.integers(0, 2), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 4), TOKENS), max_size=30), TOKENS)
def test_match_equals_linear_search(assignments: list[tuple[int, list[int]]], prompt: list[int]) -> None:
    tree, paths = PrefixTree(), dict[int, list[int]]()
    for slot, tokens in assignments:
        tree.assign(slot, tokens)
        paths[slot] = tokens
    shared = {slot: common(tokens, prompt) for slot, tokens in paths.items()}
    best = max(shared.values(), default=0)
    length, holders = tree.match(prompt)
    assert length == best
    if best:
        assert holders == {slot for slot, count in shared.items() if count == best}
    for slot, tokens in paths.items():
        assert list(tree.tokens(slot)) == tokens


@given(TOKENS, TOKENS, st.integers(0, 5))
def test_shared_prefix(edge: list[int], tokens: list[int], start: int) -> None:
    start = min(start, len(tokens))
    assert shared_prefix(edge, tokens, start) == common(edge, tokens[start:])


def test_forgetting_the_last_slot_leaves_nothing() -> None:
    tree = PrefixTree()
    tree.assign(0, [1, 2, 3])
    tree.assign(1, [1, 2, 4])
    tree.assign(0, [])
    assert tree.match([1, 2, 3]) == (2, frozenset({1}))
    tree.assign(1, [])
    assert tree.match([1, 2, 3]) == (0, frozenset())
