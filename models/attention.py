"""Causal attention over packed sequences, through torch's fused kernels.

Sequences never see each other because they are attended one run of equal lengths at a time; a mask over
the whole row would compute the blocks between them only to throw them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from lichen.models.packing import Packed


class KVCache:
    """Keys and values of sequences, for evaluation token by token; no gradient goes through it.

    A model fills it: `lengths[i]` tokens of sequence i are in it. Capacity grows by doubling.
    """

    def __init__(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        self._stored: dict[tuple[int, int], Tensor] = {}  # (layer, sequence) -> [2, capacity, heads, width]

    def extend(self, layer: int, sequence: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [new, heads, width] behind `lengths[sequence]`; all of them [tokens, ...].

        The lengths themselves change with `advance`, after the last layer.
        """
        past, total = self.lengths[sequence], self.lengths[sequence] + len(keys)
        stored = self._stored.get((layer, sequence))
        if stored is None or stored.shape[1] < total:
            capacity = max(64, 1 << (total - 1).bit_length())
            grown = keys.new_empty(2, capacity, *keys.shape[1:])
            if stored is not None:
                grown[:, :past] = stored[:, :past]
            stored = self._stored[layer, sequence] = grown
        stored[0, past:total] = keys.detach()
        stored[1, past:total] = values.detach()
        return stored[0, :total], stored[1, :total]

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens that every layer has stored."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        self.lengths[sequence] = min(length, self.lengths[sequence])


class AttentionPlan:
    """What all layers of one forward pass share: where sequences lie, positions, masks."""

    def __init__(self, packed: Packed, cache: KVCache | None = None) -> None:
        self.packed, self.cache = packed, cache
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    @cached_property
    def positions(self) -> Tensor:
        """int64 [tokens]."""
        return self.packed.positions(self.cache.lengths if self.cache is not None else None)

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """query [tokens, heads, width], keys and values [tokens, kv_heads, width] to query's shape.

        window: a token sees only so many, itself included; None for all before it.
        """
        if self.cache is not None:
            return self._attend_cached(layer, query, keys, values, scale, window)
        pieces = []
        front = self.packed.shared
        if front:
            q, k, v = (_sequences(x[:front], 1) for x in (query, keys, values))
            pieces.append(self._attention(q, k, v, scale, window).transpose(1, 2).flatten(0, 1))
            before = k, v  # [1, heads, shared, width]
        for first, count, length in self.packed.spans():
            part = slice(first, first + count * length)
            # [sequences, heads, tokens, width]
            q, k, v = (_sequences(x[part], count) for x in (query, keys, values))
            if front:
                k, v = (
                    torch.cat([old.expand(count, -1, -1, -1), new], dim=2)
                    for old, new in zip(before, (k, v), strict=True)
                )
            pieces.append(self._attention(q, k, v, scale, window).transpose(1, 2).flatten(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _attend_cached(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        assert self.cache is not None
        pieces = []
        parts = zip(*(self.packed.split(x) for x in (query, keys, values)), strict=True)
        for sequence, (new_query, new_keys, new_values) in enumerate(parts):
            k, v = self.cache.extend(layer, sequence, new_keys, new_values)
            if window is not None:
                seen = window + len(new_query) - 1
                k, v = k[-seen:], v[-seen:]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (new_query, k, v))
            pieces.append(self._attention(q, k, v, scale, window).squeeze(0).transpose(0, 1))
        return torch.cat(pieces)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        queries, length = q.shape[2], k.shape[2]
        mask = self._mask(queries, length, window, q.device)
        return functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and queries > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _mask(self, queries: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which keys the last `queries` of `length` tokens see: bool [queries, length].

        None where the plain causal rule (or, for one query, all) says the same.
        """
        narrow = window if window is not None and window < length else None
        if narrow is None and queries in (1, length):
            return None
        key = (queries, length, narrow)
        if key not in self._masks:
            behind = torch.arange(length - queries, length).unsqueeze(1) - torch.arange(length)
            mask = behind >= 0
            if narrow is not None:
                mask &= behind < narrow
            self._masks[key] = mask.to(device)
        return self._masks[key]


def _sequences(x: Tensor, count: int) -> Tensor:
    """[sequences x tokens, heads, width] to [sequences, heads, tokens, width]."""
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)
