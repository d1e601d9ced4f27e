"""Which slot's KV cache already holds the beginning of a prompt: a radix tree over token ids.

Each slot owns one path from the root: the tokens in its cache. An edge carries a run of tokens and the
set of slots whose path covers the whole edge, so the longest shared beginning of a new prompt with any
slot is found in time proportional to its length, however many slots there are.
The idea is RadixAttention's (arXiv 2312.07104); here a slot's cells are copied or cut, not referenced.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Node:
    __slots__ = ("children", "edge", "slots")

    def __init__(self, edge: list[int], slots: set[int]) -> None:
        self.edge = edge  # tokens on the way here from the parent
        self.slots = slots  # slots whose path covers the whole edge
        self.children: dict[int, _Node] = {}


class PrefixTree:
    """Longest-prefix match of prompts against the tokens of slots."""

    def __init__(self) -> None:
        self._root = _Node([], set())
        self._paths: dict[int, list[int]] = {}

    def __bool__(self) -> bool:
        """Whether any slot has a path."""
        return bool(self._paths)

    def assign(self, slot: int, tokens: Sequence[int]) -> None:
        """Make `tokens` the path of `slot`; an empty path forgets the slot."""
        old = self._paths.get(slot)
        if old is not None and len(old) == len(tokens) and old == tokens:
            return
        self._forget(slot)
        if not tokens:
            return
        path = self._paths[slot] = list(tokens)
        node, at = self._root, 0
        while at < len(path):
            child = node.children.get(path[at])
            if child is None:
                node.children[path[at]] = _Node(path[at:], {slot})
                return
            shared = shared_prefix(child.edge, path, at)
            if shared < len(child.edge):
                child = self._split(node, child, shared)
            child.slots.add(slot)
            node, at = child, at + shared

    def match(self, tokens: Sequence[int]) -> tuple[int, frozenset[int]]:
        """Length of the longest beginning of `tokens` that a slot holds, and the slots that hold it."""
        node, at = self._root, 0
        slots: frozenset[int] = frozenset()
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            shared = shared_prefix(child.edge, tokens, at)
            slots = frozenset(child.slots)
            at += shared
            if shared < len(child.edge):
                break
            node = child
        return at, slots

    def tokens(self, slot: int) -> Sequence[int]:
        """The path of a slot; empty for an unknown one."""
        return self._paths.get(slot, ())

    @staticmethod
    def _split(parent: _Node, child: _Node, length: int) -> _Node:
        """Cut an edge after `length` tokens; returns the new upper node."""
        upper = _Node(child.edge[:length], set(child.slots))
        child.edge = child.edge[length:]
        upper.children[child.edge[0]] = child
        parent.children[upper.edge[0]] = upper
        return upper

    def _forget(self, slot: int) -> None:
        path = self._paths.pop(slot, None)
        if path is None:
            return
        node, at = self._root, 0
        while at < len(path):
            child = node.children[path[at]]
            child.slots.discard(slot)
            if not child.slots:  # nobody else passes here: the whole branch was this slot's
                del node.children[path[at]]
                return
            node, at = child, at + len(child.edge)


def shared_prefix(edge: Sequence[int], tokens: Sequence[int], start: int = 0) -> int:
    """How many tokens `edge` and `tokens[start:]` have in common at their beginning."""
    limit = min(len(edge), len(tokens) - start)
    if edge[:limit] == tokens[start : start + limit]:  # the common case, at the speed of a C loop
        return limit
    low, high = 0, limit  # invariant: the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if edge[low:middle] == tokens[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low
