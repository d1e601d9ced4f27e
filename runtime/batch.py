"""A step's chunks as the four columns that the native context decodes."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from lichen.errors import EngineError
from lichen.runtime.native import DECODE_NO_KV_SLOT
from lichen.runtime.scheduler import Chunk
from lichen.runtime.sequence import Sequence

Columns = tuple[list[int], list[int], list[int], list[int]]


def pack(chunks: Iterable[Chunk]) -> Columns:
    """Tokens, positions, slots and whether logits are wanted, [n] each, in the order of the chunks.

    Logits are wanted after a chunk's last known token if it completes, and after each drafted token.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    for chunk in chunks:
        known, drafted = chunk.start + chunk.count, len(chunk.draft)
        tokens += chunk.sequence.tokens[chunk.start : known]
        tokens += chunk.draft
        positions += range(chunk.start, known + drafted)
        slots += [slot_of(chunk.sequence)] * (chunk.count + drafted)
        outputs += [0] * (chunk.count - 1)
        outputs += [int(chunk.completes)] + [1] * drafted
    return tokens, positions, slots, outputs


def runs_of(slots: Items[int]) -> list[int]:
    """Sizes of the groups of slots that follow on each other; slots ascending."""
    runs: list[int] = []
    for at, slot in enumerate(slots):
        if at and slot == slots[at - 1] + 1:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs


def micro_batches(slots: Items[int], lengths: Items[int]) -> list[int]:
    """Tokens of the micro-batches in which llama.cpp computes a step of one KV stream a slot, in their order.

    It takes sequences from the first that is left, as long as their slots follow on each other, and of each
    as many tokens as the shortest has; then what is left. slots ascending, lengths: tokens of each.
    """
    left, widths, first = list(lengths), [], 0
    while first < len(left):
        if not left[first]:
            first += 1
            continue
        last = first + 1
        while last < len(left) and left[last] and slots[last] == slots[last - 1] + 1:
            last += 1
        shortest = min(left[first:last])
        widths.append(shortest * (last - first))
        left[first:last] = [count - shortest for count in left[first:last]]
    return widths


def slot_of(sequence: Sequence) -> int:
    """The slot of a running sequence."""
    assert sequence.slot is not None, "a running sequence has a slot"
    return sequence.slot


def decode_error(code: int) -> EngineError:
    """What a code of llama_decode other than 0 means for the sequences of its batch."""
    reason = "found no room in the KV cache" if code == DECODE_NO_KV_SLOT else f"failed with code {code}"
    return EngineError(f"The engine could not compute this answer: decoding {reason}.", hint="Try again.")
