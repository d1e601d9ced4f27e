"""Who sits in which slot of the KV cache, and which slot a new prompt should start from.

A finished sequence leaves its tokens in its slot, so the next prompt that begins alike starts there.
Pure bookkeeping: the caller carries the decision out on the native context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lichen.runtime.prefix import PrefixTree, shared_prefix
from lichen.runtime.sequence import Sequence as LiveSequence

MIN_COPY = 16  # tokens: copying a stream costs a few milliseconds, about what computing these would
MIN_WAIT = 16  # tokens: a prompt waits for a running prefill if that saves at least this much


@dataclass(slots=True, frozen=True)
class Placement:
    """Start in `slot` with its first `reused` tokens, copied from slot `copy_from` if that is given.

    held: the tokens that were in the slot until now.
    """

    slot: int
    reused: int
    copy_from: int | None
    held: Sequence[int] = field(default=(), compare=False)


class SlotPool:
    """Free and taken slots, and the prefix tree over what they hold."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: dict[int, None] = dict.fromkeys(range(count))  # least recently used first
        self._tree = PrefixTree()

    @property
    def free(self) -> int:
        """Slots without a live sequence."""
        return len(self._free)

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are kept, in live and in idle slots."""
        return sum(len(self._tree.tokens(slot)) for slot in range(self.count))

    def acquire(self, prompt: Sequence[int]) -> Placement | None:
        """Take the best free slot for `prompt`; None when all are taken.

        At least the prompt's last token is left to compute: its logits are needed.
        """
        if not self._free:
            return None
        placement = self._place(prompt)
        placement = replace(placement, held=self._tree.tokens(placement.slot))
        del self._free[placement.slot]
        self._tree.assign(placement.slot, prompt[: placement.reused])
        return placement

    def _place(self, prompt: Sequence[int]) -> Placement:
        length, holders = self._tree.match(prompt)
        length = min(length, len(prompt) - 1)
        oldest = min(self._free, key=lambda slot: len(self._tree.tokens(slot)) > 0)  # empty ones first
        if length <= 0:
            return Placement(oldest, 0, None)
        idle = [slot for slot in holders if slot in self._free]
        if idle:
            nearest = min(idle, key=lambda slot: len(self._tree.tokens(slot)))
            lost = len(self._tree.tokens(nearest)) - length
            if lost <= length or nearest == oldest:
                return Placement(nearest, length, None)
            # Cutting a long conversation down to a short shared beginning would waste it: copy instead.
        if oldest in holders:
            return Placement(oldest, length, None)
        return Placement(oldest, length, min(holders)) if length >= MIN_COPY else Placement(oldest, 0, None)

    def tokens(self, slot: int) -> Sequence[int]:
        """What a slot holds."""
        return self._tree.tokens(slot)

    def longest(self, prompt: Sequence[int]) -> int:
        """Tokens of the longest beginning of `prompt` that any slot holds."""
        return self._tree.match(prompt)[0]

    def update(self, slot: int, tokens: Sequence[int]) -> None:
        """Tell what a slot holds now."""
        self._tree.assign(slot, tokens)

    def release(self, slot: int, tokens: Sequence[int]) -> None:
        """Give a slot back; it keeps `tokens` for whoever comes with the same beginning."""
        self._tree.assign(slot, tokens)
        self._free[slot] = None

    def worth_waiting(self, prompt: Sequence[int], live: Iterable[LiveSequence]) -> bool:
        """Whether a running prefill will soon hold much more of `prompt` than any slot does now."""
        held, holders = self._tree.match(prompt)
        for other in live:
            if other.computed < len(other.prompt):
                shared = min(shared_prefix(other.prompt, prompt), len(prompt) - 1)
                elsewhere = 0 if other.slot in holders else held
                if shared - elsewhere >= MIN_WAIT and other.computed < shared:
                    return True
        return False
