"""Which slot a prompt starts from."""

from __future__ import annotations

from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from lichen.runtime.generation import Mailbox
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.slots import MIN_WAIT, Placement, SlotPool

SYSTEM = list(range(100, 200))


def finished(pool: SlotPool, prompt: list[int], answer: list[int]) -> int:
    placement = pool.acquire(prompt)
    assert placement is not None
    pool.release(placement.slot, prompt + answer)
    return placement.slot


def test_the_next_turn_of_a_conversation_continues_in_place() -> None:
    pool = SlotPool(4)
    slot = finished(pool, [*SYSTEM, 1, 2], [3, 4])
    assert pool.acquire([*SYSTEM, 1, 2, 3, 4, 5]) == Placement(slot, 104, None)


def test_the_last_prompt_token_is_always_computed() -> None:
    pool = SlotPool(2)
    slot = finished(pool, SYSTEM, [])
    assert pool.acquire(SYSTEM) == Placement(slot, len(SYSTEM) - 1, None)


def test_a_prefix_in_a_busy_slot_is_copied() -> None:
    pool = SlotPool(2)
    busy = pool.acquire([*SYSTEM, 1])
    assert busy is not None
    pool.update(busy.slot, SYSTEM)
    other = pool.acquire([*SYSTEM, 2])
    assert other == Placement(1 - busy.slot, len(SYSTEM), busy.slot)


def test_a_long_conversation_is_copied_rather_than_cut_down_to_a_short_shared_beginning() -> None:
    pool = SlotPool(2)
    kept = finished(pool, SYSTEM, list(range(1000)))
    placement = pool.acquire([*SYSTEM, 7])
    assert placement == Placement(1 - kept, len(SYSTEM), kept)


def test_live_slots_stay_together() -> None:
    """Streams of slots that are no neighbours cost a micro-batch each."""
    pool = SlotPool(8)
    slots = [pool.acquire([number]) for number in range(8)]
    assert [one and one.slot for one in slots] == list(range(8))
    for slot in (1, 3, 5, 6, 4):
        pool.release(slot, [slot])
    chosen = [pool.acquire([100 + number]) for number in range(3)]
    assert [one and one.slot for one in chosen] == [1, 3, 6]  # beside live ones, and of the older half
    for slot in range(4):
        pool.release(slot, ())
    emptied = [pool.acquire([200 + number]) for number in range(4)]
    assert [one and one.slot for one in emptied] == [0, 1, 2, 3]  # tokens of 4 and 5 may be wanted again


def test_no_free_slot_gives_none() -> None:
    pool = SlotPool(1)
    assert pool.acquire([1]) is not None
    assert pool.acquire([1]) is None


def test_a_prompt_waits_for_a_running_prefill_of_the_same_beginning() -> None:
    pool = SlotPool(2)
    running = Sequence(prompt=[*SYSTEM, 1], options=SamplingOptions(), mailbox=Mock(spec=Mailbox))
    assert len(SYSTEM) >= MIN_WAIT
    assert pool.worth_waiting([*SYSTEM, 2], [running])
    assert not pool.worth_waiting([*SYSTEM[:10], 2], [running])
    running.computed = len(SYSTEM)
    assert not pool.worth_waiting([*SYSTEM, 2], [running])


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), min_size=1, max_size=40)), max_size=40))
def test_slots_are_never_shared_and_reuse_is_true(steps: list[tuple[bool, list[int]]]) -> None:
    pool, taken = SlotPool(3), dict[int, list[int]]()
    held: dict[int, list[int]] = {slot: [] for slot in range(3)}
    for give_back, prompt in steps:
        if give_back and taken:
            slot, tokens = taken.popitem()
            held[slot] = tokens
            pool.release(slot, tokens)
        placement = pool.acquire(prompt)
        if placement is None:
            assert len(taken) == 3
            continue
        assert placement.slot not in taken
        assert placement.reused < len(prompt)
        source = placement.slot if placement.copy_from is None else placement.copy_from
        assert held[source][: placement.reused] == prompt[: placement.reused]
        taken[placement.slot] = prompt
        held[placement.slot] = prompt
        pool.update(placement.slot, prompt)
    assert pool.free == 3 - len(taken)
