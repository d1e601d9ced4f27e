"""Hidden states below the first adapted block: computed once, kept in a file over all epochs.

They depend on no adapter. What all sequences begin with (a system prompt, an instruction) goes through the
model once for each row of sequences, also above: `Packed.shared`. The file has no name, so nothing is left
of it when the process ends, however it ends; the system's page cache keeps in memory what there is room for.

Invariant: the state of a sequence is the same to the bit whenever it is computed. Products over several
sequences round by their company, so those that are kept are always computed in the same groups, and the
others alone. That is what lets a resumed training equal an uninterrupted one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lichen.models.decoder import Decoder
from lichen.models.packing import Packed, pack

GROUP_TOKENS = 128  # enough for products to be fast; whoever needs one sequence of a group computes all of it


class FrozenStates:
    """Hidden state `first` of fixed sequences of tokens, by their number.

    shared: tokens that all of them begin with, and that each is longer than. limit: bytes of the file.
    """

    def __init__(
        self,
        model: Decoder,
        first: int,
        sequences: Sequence[Sequence[int]],
        *,
        limit: int,
        folder: Path,
        shared: int = 0,
    ) -> None:
        self._model, self._first = model, first
        self._front = list(sequences[0][:shared]) if shared else []
        self._sequences = [sequence[shared:] for sequence in sequences]
        self._width = model.shape.width
        self._places: dict[int, int] = {}  # of what is kept: its first row in the file
        self._groups: dict[int, list[int]] = {}  # of what is kept: whom it is computed with
        self._known: set[int] = set()
        rows = self._plan(limit // (4 * self._width)) if first else 0  # embedding is as fast as reading
        if rows:
            with tempfile.TemporaryFile(dir=folder) as file:  # lives as long as it is mapped
                self._stored = np.memmap(file, np.float32, "w+", shape=(rows, self._width))

    def _plan(self, room: int) -> int:
        """Decide what is kept, the shortest first, side by side as it is computed; rows of the file."""
        rows, size = 0, 0
        group: list[int] = []
        lengths = [len(sequence) for sequence in self._sequences]
        for number in sorted(range(len(lengths)), key=lambda number: (lengths[number], number)):
            if rows + lengths[number] > room:
                break
            if size + lengths[number] > GROUP_TOKENS:
                group, size = [], 0
            group.append(number)
            size += lengths[number]
            self._groups[number] = group
            self._places[number] = rows
            rows += lengths[number]
        return rows

    @property
    def known(self) -> int:
        """How many sequences' states are kept by now."""
        return len(self._known)

    def batch(self, numbers: Sequence[int]) -> tuple[Packed, Tensor]:
        """Sequences one after the other behind what they share, and their states, float32 [tokens, width]."""
        packed = pack([self._sequences[number] for number in numbers], shared=self._front)
        return packed, torch.cat([*self._front_states, *(self._state(number) for number in numbers)])

    @cached_property
    def _front_states(self) -> list[Tensor]:
        """Of what all share; computed alone, and so the same whoever comes behind it."""
        if not self._front:
            return []
        packed = pack([self._front])
        with torch.no_grad():
            return [self._model.run(self._model.embed(packed), packed, stop=self._first)]

    def _state(self, number: int) -> Tensor:
        if number not in self._places:
            return self._computed([number])
        if number not in self._known:
            self._keep(self._groups[number])
        place = self._places[number]
        return torch.from_numpy(np.array(self._stored[place : place + len(self._sequences[number])]))

    def _keep(self, group: list[int]) -> None:
        states = self._computed(group).numpy()
        place = self._places[group[0]]
        self._stored[place : place + len(states)] = states
        self._known.update(group)

    def _computed(self, numbers: list[int]) -> Tensor:
        packed = pack([self._sequences[number] for number in numbers], shared=self._front)
        with torch.no_grad():
            return self._model.run(self._model.embed(packed), packed, stop=self._first)[packed.shared :]
