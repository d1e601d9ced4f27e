"""Who sits in which slot of the KV cache, and which slot a new prompt should start from.

A finished sequence leaves its tokens in its slot, so the next prompt that begins alike starts there.
What a slot holds was computed with one adaptation, and serves only prompts with the same.
Pure bookkeeping: the caller carries the decision out on the native context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.prefix import PrefixTree, shared_prefix
from lichen.runtime.sequence import Sequence as LiveSequence

MIN_COPY = 16  # tokens: copying a stream costs a few milliseconds, about what computing these would
MIN_WAIT = 16  # tokens: a prompt waits for a running prefill if that saves at least this much


@dataclass(slots=True, frozen=True)
class Placement:
    """Start in `slot` with its first `reused` tokens, copied from slot `copy_from` if that is given.

    held: the tokens that were in the slot until now; held_with: what they were computed with.
    """

    slot: int
    reused: int
    copy_from: int | None
    held: Sequence[int] = field(default=(), compare=False)
    held_with: Adaptation = field(default=PLAIN, compare=False)


class SlotPool:
    """Free and taken slots, and for each adaptation a prefix tree over what its slots hold."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: dict[int, None] = dict.fromkeys(range(count))  # least recently used first
        self._trees: dict[Adaptation, PrefixTree] = {}
        self._with: dict[int, Adaptation] = dict.fromkeys(range(count), PLAIN)

    @property
    def free(self) -> int:
        """Slots without a live sequence."""
        return len(self._free)

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are kept, in live and in idle slots."""
        return sum(len(self.tokens(slot)) for slot in range(self.count))

    def acquire(self, prompt: Sequence[int], adaptation: Adaptation = PLAIN) -> Placement | None:
        """Take the best free slot for `prompt`; None when all are taken.

        At least the prompt's last token is left to compute: its logits are needed.
        """
        if not self._free:
            return None
        placement = self._place(prompt, adaptation)
        slot = placement.slot
        placement = replace(placement, held=self.tokens(slot), held_with=self._with[slot])
        del self._free[slot]
        self.update(slot, ())
        self._with[slot] = adaptation
        self.update(slot, prompt[: placement.reused])
        return placement

    def _place(self, prompt: Sequence[int], adaptation: Adaptation) -> Placement:
        length, holders = self._match(prompt, adaptation)
        length = min(length, len(prompt) - 1)
        fresh = self._fresh()
        if length <= 0:
            return Placement(fresh, 0, None)
        idle = [slot for slot in holders if slot in self._free]
        if idle:
            nearest = min(idle, key=lambda slot: len(self.tokens(slot)))
            lost = len(self.tokens(nearest)) - length
            if lost <= length or nearest == fresh:
                return Placement(nearest, length, None)
            # Cutting a long conversation down to a short shared beginning would waste it: copy instead.
        if fresh in holders:
            return Placement(fresh, length, None)
        return Placement(fresh, length, min(holders)) if length >= MIN_COPY else Placement(fresh, 0, None)

    def _fresh(self) -> int:
        """The free slot whose tokens are missed least: an empty one, else one of the older half.

        Of those the one with most live neighbours: streams of neighbouring slots are computed together,
        others one after the other (`batch.runs_of`).
        """
        free = list(self._free)
        empty = [slot for slot in free if not self.tokens(slot)]
        candidates = empty or free[: (len(free) + 1) // 2]
        return max(candidates, key=lambda slot: self._live(slot - 1) + self._live(slot + 1))

    def _live(self, slot: int) -> bool:
        return 0 <= slot < self.count and slot not in self._free

    def _match(self, prompt: Sequence[int], adaptation: Adaptation) -> tuple[int, frozenset[int]]:
        tree = self._trees.get(adaptation)
        return tree.match(prompt) if tree is not None else (0, frozenset())

    def tokens(self, slot: int) -> Sequence[int]:
        """What a slot holds."""
        tree = self._trees.get(self._with[slot])
        return tree.tokens(slot) if tree is not None else ()

    def adaptation(self, slot: int) -> Adaptation:
        """What the tokens of a slot were computed with."""
        return self._with[slot]

    def longest(self, prompt: Sequence[int], adaptation: Adaptation = PLAIN) -> int:
        """Tokens of the longest beginning of `prompt` that any slot holds."""
        return self._match(prompt, adaptation)[0]

    def update(self, slot: int, tokens: Sequence[int]) -> None:
        """Tell what a slot holds now."""
        adaptation = self._with[slot]
        tree = self._trees.get(adaptation)
        if tree is None:
            if not tokens:
                return
            tree = self._trees[adaptation] = PrefixTree()
        tree.assign(slot, tokens)
        if not tree:
            del self._trees[adaptation]

    def release(self, slot: int, tokens: Sequence[int]) -> None:
        """Give a slot back; it keeps `tokens` for whoever comes with the same beginning."""
        self.update(slot, tokens)
        self._free[slot] = None

    def worth_waiting(
        self, prompt: Sequence[int], live: Iterable[LiveSequence], adaptation: Adaptation = PLAIN
    ) -> bool:
        """Whether a running prefill will soon hold much more of `prompt` than any slot does now."""
        held, holders = self._match(prompt, adaptation)
        for other in live:
            if other.computed < len(other.prompt) and other.adaptation == adaptation:
                shared = min(shared_prefix(other.prompt, prompt), len(prompt) - 1)
                elsewhere = 0 if other.slot in holders else held
                if shared - elsewhere >= MIN_WAIT and other.computed < shared:
                    return True
        return False
