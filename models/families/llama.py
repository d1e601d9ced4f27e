"""Llama and the models built like it: SmolLM2, Mistral, TinyLlama.

Mixtures of experts are refused: under the same name they have other feed-forward layers.
"""

from __future__ import annotations

from lichen.models.decoder import Decoder
from lichen.models.metadata import Metadata
from lichen.models.rope import Pairs
from lichen.models.shape import read_shape
from lichen.models.weights import Weights


def build(metadata: Metadata, weights: Weights) -> Decoder:
    """The model of a file. Raises ModelFileError."""
    for key in ("expert_count", "expert_used_count"):
        metadata.refuse(key, "mixtures of experts are not implemented", unless=(0,))
    return Decoder(weights, read_shape(metadata, Pairs.INTERLEAVED))
