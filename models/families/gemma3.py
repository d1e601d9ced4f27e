"""Gemma 3 (Gemma team, 2025, arXiv:2503.19786), its text part.

Norms before and after each part; five layers with a sliding window and a rope of their own, then one
that sees everything. The file holds the norms' factors with the 1 already added, and not every number:
the pattern of six, the local base of 10,000 and the query scale of the 27B model (62 layers) are
constants of the family.
"""

from __future__ import annotations

from dataclasses import replace

from lichen.models.decoder import Decoder
from lichen.models.gate import Activation
from lichen.models.metadata import Metadata
from lichen.models.rope import Pairs, Rope
from lichen.models.shape import Reach, Shape, read_shape
from lichen.models.weights import Weights

PATTERN = 6
LOCAL_BASE = 10000.0
LAYERS_27B = 62


def build(metadata: Metadata, weights: Weights) -> Decoder:
    """The model of a file. Raises ModelFileError."""
    shape = read_shape(metadata, Pairs.HALVES)
    # only the largest model divides by the width of a head that it would have without key_length
    unscaled = shape.width // shape.heads if shape.layers == LAYERS_27B else shape.key_width
    cap = metadata.number("final_logit_softcapping", 0.0, zero=True)
    return Decoder(
        weights,
        replace(
            shape,
            reaches=_reaches(metadata, shape),
            activation=Activation.GELU_TANH,
            query_key_norms=True,
            post_norms=True,
            attention_scale=unscaled**-0.5,
            embedding_scale=shape.width**0.5,
            logit_cap=cap or None,
        ),
    )


def _reaches(metadata: Metadata, shape: Shape) -> tuple[Reach, ...]:
    rope = shape.reaches[0].rope
    if rope.yarn is not None:
        raise metadata.fault("YaRN in a model with sliding windows is not implemented")
    if not metadata.has("attention.sliding_window"):
        return shape.reaches
    window = metadata.integer("attention.sliding_window", limit=1 << 31)
    period = metadata.integer("attention.sliding_window_pattern", PATTERN)
    # scaling for longer contexts is for the layers that see them
    base = metadata.number("rope.freq_base_swa", LOCAL_BASE)
    local = Reach(rope=Rope(pairs=rope.pairs, dims=rope.dims, base=base), window=window)
    return tuple(local if index % period < period - 1 else Reach(rope=rope) for index in range(shape.layers))
