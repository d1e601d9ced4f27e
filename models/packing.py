"""Several sequences in one row of tokens, without padding: each sees itself alone, from position 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lichen.errors import RequestError


@dataclass(frozen=True, slots=True)
class Packed:
    """tokens: int64 [tokens], the sequences one after the other. lengths: tokens of each, at least one."""

    tokens: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or self.tokens.shape != (sum(self.lengths),):
            raise RequestError(
                f"Lengths {list(self.lengths)} do not make up a row of {list(self.tokens.shape)} tokens; "
                "each sequence needs at least one."
            )

    def positions(self, starts: Sequence[int] | None = None) -> Tensor:
        """int64 [tokens]; starts: the first position of each sequence, 0 unless given."""
        firsts = starts or [0] * len(self.lengths)
        pieces = [
            torch.arange(first, first + length) for first, length in zip(firsts, self.lengths, strict=True)
        ]
        return torch.cat(pieces).to(self.tokens.device)

    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of sequences of one length: (first token, sequences, tokens of each)."""
        found, first = [], 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            found.append((first, count, length))
            first += count * length
        return found

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """values [tokens, ...] by sequence."""
        return torch.split(values, list(self.lengths))


def pack(sequences: Sequence[Sequence[int]], device: torch.device | None = None) -> Packed:
    """Pack lists of token ids. Sequences of equal length cost least side by side.

    Raises RequestError for an empty sequence, or none.
    """
    flat = [token for sequence in sequences for token in sequence]
    return Packed(torch.tensor(flat, dtype=torch.int64, device=device), tuple(map(len, sequences)))
