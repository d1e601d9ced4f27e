"""The numbers that make a model, and how a file's metadata gives them."""

from __future__ import annotations

from dataclasses import dataclass

from lichen.models.gate import Activation
from lichen.models.metadata import Metadata
from lichen.models.rope import Pairs, Rope, read_rope

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 16  # of a head


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far a layer sees: its rope, and its window in tokens (None: everything before)."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of a model.

    width: of the hidden state. hidden: of the feed-forward layers. attention_scale: multiplies the
    products of queries and keys. reaches: one a layer. biases: queries, keys and values must have them
    (a bias that is in the file is always used). logit_cap: logits are drawn into (-cap, cap).
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    hidden: int
    epsilon: float
    attention_scale: float
    reaches: tuple[Reach, ...]
    activation: Activation = Activation.SILU
    biases: bool = False
    query_key_norms: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    logit_cap: float | None = None


def read_shape(metadata: Metadata, pairs: Pairs) -> Shape:
    """What most families share; a family replaces what it does differently. Raises ModelFileError."""
    width, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    layers = metadata.integer("block_count", limit=MAX_LAYERS)
    kv_heads = metadata.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise metadata.fault(f"{heads} attention heads cannot share {kv_heads} heads of keys and values")
    head_width = width // heads
    key_width = metadata.integer("attention.key_length", head_width, limit=MAX_WIDTH)
    if not metadata.flag("attention.causal", True):
        raise metadata.fault("it is an encoder (attention.causal is false), which lichen does not train")
    return Shape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        key_width=key_width,
        value_width=metadata.integer("attention.value_length", head_width, limit=MAX_WIDTH),
        hidden=metadata.integer("feed_forward_length"),
        epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
        attention_scale=key_width**-0.5,
        reaches=(Reach(rope=read_rope(metadata, key_width, pairs)),) * layers,
    )
