"""Qwen2 and Qwen2.5: queries, keys and values have biases."""

from __future__ import annotations

from dataclasses import replace

from lichen.models.decoder import Decoder
from lichen.models.metadata import Metadata
from lichen.models.rope import Pairs
from lichen.models.shape import read_shape
from lichen.models.weights import Weights


def build(metadata: Metadata, weights: Weights) -> Decoder:
    """The model of a file. Raises ModelFileError."""
    return Decoder(weights, replace(read_shape(metadata, Pairs.HALVES), biases=True))
