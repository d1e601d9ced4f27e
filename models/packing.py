"""Several sequences in one row of tokens, without padding: each sees itself alone, from position 0.

A beginning that all share may stand in the row once, before them; then each sees it and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lichen.errors import RequestError


@dataclass(frozen=True, slots=True)
class Packed:
    """tokens: int64 [tokens], the sequences one after the other. lengths: tokens of each, at least one.

    shared: tokens at the front of the row that come before every sequence, and count in none's length.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    shared: int = 0

    def __post_init__(self) -> None:
        whole = self.shared + sum(self.lengths)
        if not self.lengths or min(self.lengths) < 1 or self.shared < 0 or self.tokens.shape != (whole,):
            raise RequestError(
                f"Lengths {list(self.lengths)} do not make up a row of {list(self.tokens.shape)} tokens, "
                f"{self.shared} of them shared; each sequence needs at least one."
            )

    def positions(self, starts: Sequence[int] | None = None) -> Tensor:
        """int64 [tokens]; starts: the first position of each sequence, `shared` unless given."""
        firsts = starts or [self.shared] * len(self.lengths)
        pieces = [
            torch.arange(first, first + length) for first, length in zip(firsts, self.lengths, strict=True)
        ]
        return torch.cat([torch.arange(self.shared), *pieces]).to(self.tokens.device)

    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of sequences of one length: (first token, sequences, tokens of each)."""
        found, first = [], self.shared
        for length, run in groupby(self.lengths):
            count = len(list(run))
            found.append((first, count, length))
            first += count * length
        return found

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """values [tokens, ...] by sequence, without what they share."""
        return torch.split(values[self.shared :], list(self.lengths))


def pack(
    sequences: Sequence[Sequence[int]], device: torch.device | None = None, *, shared: Sequence[int] = ()
) -> Packed:
    """Pack lists of token ids. Sequences of equal length cost least side by side.

    shared: token ids that come before each of them. Raises RequestError for an empty sequence, or none.
    """
    flat = [*shared, *(token for sequence in sequences for token in sequence)]
    lengths = tuple(map(len, sequences))
    return Packed(torch.tensor(flat, dtype=torch.int64, device=device), lengths, len(shared))
