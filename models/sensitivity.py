"""How much a model's predictions change when some of its tensors are stored otherwise: measured.

The change is the mean KL divergence from the model's own distribution over the next token to that of the
changed model, over all positions of a calibration text. A tensor of layer k changes nothing below it, so a
measurement starts from the hidden state that layer k read in the unchanged model.

Invariants: the model is as before when a measurement ends, however it ends. Memory: the log-probabilities of
the unchanged model (4 bytes a position and token of the vocabulary) and its hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lichen.errors import RequestError
from lichen.models.decoder import Decoder
from lichen.models.packing import pack
from lichen.quant.gguf import GGUFTensor
from lichen.quant.linear import QuantEmbedding, QuantLinear

PART = 128  # positions whose logits are made together


class Measure:
    """Measures changes of one model on one text. windows: token ids of stretches of it."""

    @torch.no_grad()
    def __init__(self, model: Decoder, windows: Sequence[Sequence[int]]) -> None:
        if not windows:
            raise RequestError("There is no text to measure with.")
        self.model, self.forwards = model, 0
        self._packed = pack(windows)
        self._layers = _layers_by_tensor(model)
        states: dict[int, Tensor | None] = dict.fromkeys(range(len(model.blk) + 1))
        model.run(model.embed(self._packed), self._packed, keep=states)
        self._states = [state for state in states.values() if state is not None]
        # of each part: log-probabilities, float32 [positions, vocabulary]
        self._logs = [model.logits(part).log_softmax(-1) for part in _parts(self._states[-1])]

    def measurable(self) -> frozenset[str]:
        """Names of the tensors that can be exchanged."""
        return frozenset(self._layers)

    @torch.no_grad()
    def divergence(self, changed: Mapping[str, GGUFTensor]) -> float:
        """Mean KL in nats with these tensors in place of the model's.

        Raises RequestError for a tensor that no layer multiplies with.
        """
        unknown = sorted(set(changed) - set(self._layers))
        if unknown:
            raise RequestError(f"No layer multiplies with {unknown[0]}.")
        start = min((self._layers[name][0] for name in changed), default=len(self.model.blk))
        with self._exchanged(changed):
            hidden = self.model.embed(self._packed) if start < 0 else self._states[start]
            hidden = self.model.run(hidden, self._packed, start=max(0, start))
            total = 0.0
            for part, logs in zip(_parts(hidden), self._logs, strict=True):
                total += divergence(logs, self.model.logits(part))
        self.forwards += 1
        return max(0.0, total / len(hidden))

    @contextlib.contextmanager
    def _exchanged(self, changed: Mapping[str, GGUFTensor]) -> Iterator[None]:
        before = [(module, module.tensor) for name in changed for module in self._layers[name][1]]
        try:
            for name, tensor in changed.items():
                for module in self._layers[name][1]:
                    module.tensor = tensor
            yield
        finally:
            for module, tensor in before:
                module.tensor = tensor


def _parts(hidden: Tensor) -> Iterator[Tensor]:
    return (hidden[first : first + PART] for first in range(0, len(hidden), PART))


def divergence(logs: Tensor, logits: Tensor) -> float:
    """Sum over positions of the KL from log-probabilities to logits, both float32 [positions, vocabulary].

    Differences are taken before they are summed: a sum of p log q alone, over 49,152 tokens in float32, is
    off by 1e-3, more than most tensors cost.
    """
    return float(functional.kl_div(logits.log_softmax(-1), logs, reduction="sum", log_target=True))


def _layers_by_tensor(model: Decoder) -> dict[str, tuple[int, list[QuantLinear | QuantEmbedding]]]:
    """Of each tensor: the hidden state from which it matters (-1: before the first), and its layers."""
    found: dict[str, tuple[int, list[QuantLinear | QuantEmbedding]]] = {}
    places = [(-1, model.token_embd), (len(model.blk), model.output)]
    places += [(block.index, layer) for block in model.blocks for layer in block.children()]
    for start, layer in places:
        if isinstance(layer, QuantLinear | QuantEmbedding):
            first, layers = found.get(layer.tensor.name, (start, []))
            found[layer.tensor.name] = (min(first, start), [*layers, layer])
    return found
