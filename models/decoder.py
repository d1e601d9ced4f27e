"""The decoder that all families share: normalized attention and gated feed-forward blocks, residual.

A family (`families/`) says which parts a block has and with which numbers; everything here works on
packed rows: hidden states are [tokens, width]. Modules carry the names of the file's tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lichen.errors import RequestError
from lichen.models.attention import AttentionPlan, KVCache
from lichen.models.gate import gated
from lichen.models.packing import Packed
from lichen.models.rope import Rope, RopeTable
from lichen.models.shape import Shape
from lichen.models.weights import Weights


class Block(nn.Module):
    """One layer. Parts that a family does not have are None."""

    def __init__(self, weights: Weights, index: int, shape: Shape) -> None:
        super().__init__()
        self.index, self.shape, self.reach = index, shape, shape.reaches[index]
        name, width, epsilon = f"blk.{index}", shape.width, shape.epsilon
        queries, keys = shape.heads * shape.key_width, shape.kv_heads * shape.key_width
        values, attended = shape.kv_heads * shape.value_width, shape.heads * shape.value_width
        self.attn_norm = weights.norm(f"{name}.attn_norm", width, epsilon)
        self.attn_q = weights.linear(f"{name}.attn_q", queries, width, bias=shape.biases)
        self.attn_k = weights.linear(f"{name}.attn_k", keys, width, bias=shape.biases)
        self.attn_v = weights.linear(f"{name}.attn_v", values, width, bias=shape.biases)
        self.attn_output = weights.linear(f"{name}.attn_output", width, attended)
        self.ffn_norm = weights.norm(f"{name}.ffn_norm", width, epsilon)
        self.ffn_gate = weights.linear(f"{name}.ffn_gate", shape.hidden, width)
        self.ffn_up = weights.linear(f"{name}.ffn_up", shape.hidden, width)
        self.ffn_down = weights.linear(f"{name}.ffn_down", width, shape.hidden)
        self.attn_q_norm = self.attn_k_norm = self.post_attention_norm = self.post_ffw_norm = None
        if shape.query_key_norms:
            self.attn_q_norm = weights.norm(f"{name}.attn_q_norm", shape.key_width, epsilon)
            self.attn_k_norm = weights.norm(f"{name}.attn_k_norm", shape.key_width, epsilon)
        if shape.post_norms:
            self.post_attention_norm = weights.norm(f"{name}.post_attention_norm", width, epsilon)
            self.post_ffw_norm = weights.norm(f"{name}.post_ffw_norm", width, epsilon)

    def forward(self, x: Tensor, plan: AttentionPlan, turn: RopeTable) -> Tensor:
        """x [tokens, width] to the same shape."""
        attended = self._attention(self.attn_norm(x), plan, turn)
        x = x + (attended if self.post_attention_norm is None else self.post_attention_norm(attended))
        fed = self._feed_forward(self.ffn_norm(x))
        return x + (fed if self.post_ffw_norm is None else self.post_ffw_norm(fed))

    def _attention(self, x: Tensor, plan: AttentionPlan, turn: RopeTable) -> Tensor:
        shape = self.shape
        query = self.attn_q(x).unflatten(-1, (shape.heads, shape.key_width))
        keys = self.attn_k(x).unflatten(-1, (shape.kv_heads, shape.key_width))
        values = self.attn_v(x).unflatten(-1, (shape.kv_heads, shape.value_width))
        if self.attn_q_norm is not None and self.attn_k_norm is not None:
            query, keys = self.attn_q_norm(query), self.attn_k_norm(keys)
        query, keys = turn.turn(query), turn.turn(keys)
        attended = plan.attend(
            self.index, query, keys, values, scale=shape.attention_scale, window=self.reach.window
        )
        projected: Tensor = self.attn_output(attended.flatten(-2))
        return projected

    def _feed_forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.ffn_down(gated(self.ffn_gate(x), self.ffn_up(x), self.shape.activation))
        return projected


class Decoder(nn.Module):
    """A whole model over one file's weights. Nothing is trainable until the caller makes it so.

    Linear layers are `QuantLinear` modules under the file's names (`blk.0.attn_q`); an adapter takes
    the place of one with `setattr` on its block. Hidden state k is what block k reads; hidden state
    `len(model.blk)` is what the last block gives, before the output norm.
    """

    def __init__(self, weights: Weights, shape: Shape) -> None:
        super().__init__()
        self.file, self.shape = weights.file, shape
        self.dtype = torch.float32
        self.vocabulary = weights.rows("token_embd")
        self.token_embd = weights.embedding("token_embd", self.vocabulary, shape.width)
        self.blk = nn.ModuleList(Block(weights, index, shape) for index in range(shape.layers))
        self.output_norm = weights.norm("output_norm", shape.width, shape.epsilon)
        output = "output" if weights.has("output") else "token_embd"  # tied: one tensor serves both
        self.output = weights.linear(output, self.vocabulary, shape.width)
        self.register_buffer(
            "rope_freqs", weights.factors("rope_freqs", shape.reaches[0].rope.dims // 2), persistent=False
        )
        self.rope_freqs: Tensor | None

    @property
    def blocks(self) -> Sequence[Block]:
        """The layers from the embedding up."""
        return self.blk  # type: ignore[return-value]

    def forward(
        self, packed: Packed, *, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits float32 [tokens, vocabulary], or only those after the tokens at `positions`, int64 [n].

        cache: continue each of its sequences with one of `packed`; for evaluation, without gradients.
        """
        return self.logits(self.run(self.embed(packed), packed, cache=cache), positions)

    def embed(self, packed: Packed) -> Tensor:
        """Hidden state 0: [tokens, width]."""
        x: Tensor = self.token_embd(packed.tokens)
        return (x * self.shape.embedding_scale if self.shape.embedding_scale != 1 else x).to(self.dtype)

    def run(
        self,
        hidden: Tensor,
        packed: Packed,
        *,
        start: int = 0,
        stop: int | None = None,
        cache: KVCache | None = None,
        keep: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """From hidden state `start` to hidden state `stop` (None: the last), both [tokens, width].

        keep: hidden states to remember on the way; its values are filled in. Raises RequestError for
        layers that are not there, and for a cache over a part of them.
        """
        last = len(self.blk) if stop is None else stop
        if not 0 <= start <= last <= len(self.blk):
            raise RequestError(f"Hidden states {start} to {last} are not within 0 to {len(self.blk)}.")
        if cache is not None and (start, last) != (0, len(self.blk)):
            raise RequestError("A KV cache needs all layers: it would hold tokens of some layers only.")
        if cache is not None and packed.shared:
            raise RequestError("A KV cache holds whole sequences: pack them without a shared beginning.")
        plan = AttentionPlan(packed, cache)
        tables = self._tables(plan.positions, start, last)
        kept = keep if keep is not None else {}
        for index in range(start, last):
            if index in kept:
                kept[index] = hidden
            block = self.blocks[index]
            hidden = block(hidden, plan, tables[block.reach.rope])
        if last in kept:
            kept[last] = hidden
        if cache is not None:
            cache.advance(packed.lengths)
        return hidden

    def hidden_states(self, packed: Packed, layers: Collection[int]) -> Mapping[int, Tensor]:
        """The hidden states of those numbers, each [tokens, width]; no layer above the highest runs."""
        keep: dict[int, Tensor | None] = dict.fromkeys(layers)
        if not keep or min(keep) < 0:
            raise RequestError(f"There are no hidden states {sorted(keep)}; they count from 0.")
        self.run(self.embed(packed), packed, stop=max(keep), keep=keep)
        return {layer: state for layer, state in keep.items() if state is not None}

    def logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """From the last hidden state [tokens, width]: float32 [tokens or len(positions), vocabulary]."""
        chosen = hidden if positions is None else hidden[positions]
        logits: Tensor = self.output(self.output_norm(chosen)).float()
        cap = self.shape.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _tables(self, positions: Tensor, start: int, stop: int) -> Mapping[Rope, RopeTable]:
        ropes = {block.reach.rope for block in self.blocks[start:stop]}
        return {rope: rope.table(positions, self.rope_freqs) for rope in ropes}
