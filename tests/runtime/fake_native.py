"""A model that counts, in place of llama.cpp: the token after n is n + 1, and 99 ends the answer.

It obeys the native context's contract (positions in order, slots bounded, cells counted), so that the
engine's bookkeeping is tested in milliseconds. What it cannot show, the real-model tests do.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.runtime.native import DECODE_OK

END = 99
VOCABULARY = 100


class CountingModel:
    vocab_size = VOCABULARY

    def is_end(self, token: int) -> bool:
        return token == END

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()


class CountingContext:
    def __init__(self, *, slots: int = 2, context: int = 64, batch: int = 8, outputs: int = 0) -> None:
        self.slots, self.context, self.batch = slots, context, batch
        self.outputs_most = max(slots, outputs)
        self.cuttable = True
        self.held: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self.batches: list[list[tuple[int, int, int]]] = []
        self.outputs: list[int] = []
        self.codes: list[int] = []  # answers to the next decodes, before they succeed again
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.pace = 0.0  # seconds a decode takes at least
        self.closed = False
        self.copying = False
        self.adapted: tuple[str, float] = ("", 0.0)  # what is computed from here on is computed with it
        self.held_with: dict[int, tuple[str, float]] = {}

    def adapt(self, adapter: CountingAdapter | None, scale: float) -> None:
        assert adapter is None or adapter.open
        self.adapted = ("", 0.0) if adapter is None else (adapter.digest, scale)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Sequence[int]
    ) -> int:
        self.entered.set()
        assert self.gate.wait(20)
        time.sleep(self.pace)
        assert 0 < len(tokens) <= self.batch
        assert sum(outputs) <= self.outputs_most
        if self.codes and (code := self.codes.pop(0)) != DECODE_OK:
            return code
        for token, position, slot in zip(tokens, positions, slots, strict=True):
            assert position == len(self.held[slot]) < self.context, "positions follow on each other"
            assert not self.held[slot] or self.held_with[slot] == self.adapted, "one adaptation a slot"
            self.held_with[slot] = self.adapted
            self.held[slot].append(token)
        self.copying = False
        self.batches.append(list(zip(tokens, positions, slots, strict=True)))
        self.outputs = [token if wanted else -1 for token, wanted in zip(tokens, outputs, strict=True)]
        return DECODE_OK

    def truncate(self, slot: int, length: int) -> bool:
        assert length <= len(self.held[slot])
        if not self.cuttable:
            return length == len(self.held[slot])
        del self.held[slot][length:]
        return True

    def clear(self, slot: int) -> None:
        self.held[slot].clear()

    def copy(self, source: int, target: int) -> None:
        self.copying = True  # llama.cpp copies the cells before the next decode
        self.held[target] = list(self.held[source])
        self.held_with[target] = self.held_with.get(source, self.adapted)

    def cells(self, slot: int) -> int:
        return len(self.held[slot])

    def save(self, slot: int) -> bytearray:
        assert not self.copying
        return bytearray(json.dumps([self.held[slot], self.held_with.get(slot)]).encode())

    def restore(self, slot: int, data: bytearray) -> bool:
        assert not self.copying
        try:
            tokens, computed_with = json.loads(data)
        except ValueError:
            self.held[slot].clear()
            return False
        self.held[slot] = tokens
        self.held_with[slot] = tuple(computed_with)
        return True

    def close(self) -> None:
        self.closed = True


class CountingAdapter:
    """An adapter that changes only what cells are known to be computed with; its path is its digest."""

    def __init__(self, model: CountingModel, path: Path) -> None:
        self.digest = path.name
        self.open = True

    def close(self) -> None:
        assert self.open
        self.open = False


class CountingSampler:
    def __init__(self, model: CountingModel, options: Any) -> None:
        self.open = True

    def accept(self, token: int) -> None:
        assert self.open

    def sample(self, context: CountingContext, index: int) -> int:
        assert self.open
        token = context.outputs[index]
        assert token >= 0, "logits were asked for at this index"
        return (token + 1) % VOCABULARY

    def close(self) -> None:
        self.open = False
