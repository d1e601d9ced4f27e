"""A model's logits for stretches of text, computed by torch: what training and analysis see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lichen.models.load import load_model
from lichen.models.packing import pack
from lichen.quant.divergence import Logits


class TorchScorer:
    """Scores text with a file's model. Raises what `load_model` raises."""

    def __init__(self, path: Path) -> None:
        self._model = load_model(path)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """float32 [tokens, vocabulary] of one stretch that nothing comes before."""
        with torch.no_grad():
            found: Logits = self._model(pack([tokens])).numpy()
        return found

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._model.file.close()
