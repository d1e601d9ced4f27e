"""The tensors of one file as layers: each is there, has the shape that is due, and is used.

Names are those of the file without ".weight"; a module carries the same name in the model, so that the
layer of "blk.3.attn_q.weight" is `model.get_submodule("blk.3.attn_q")`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lichen.errors import ModelFileError
from lichen.models.norm import RMSNorm
from lichen.quant import ggml
from lichen.quant.gguf import GGUFFile, GGUFTensor
from lichen.quant.linear import QuantEmbedding, QuantLinear


class Weights:
    """Gives the tensors of a file out as layers. All methods raise ModelFileError."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._tensors, self._file_name = file.tensors, file.path.name
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`.weight."""
        return f"{name}.weight" in self._tensors

    def rows(self, name: str) -> int:
        """Rows of a matrix, where its metadata does not say so (the vocabulary's size)."""
        tensor = self._tensors.get(f"{name}.weight")
        if tensor is None or len(tensor.shape) != 2:
            raise ModelFileError(f"{self._file_name} has no matrix {name}.weight.")
        return tensor.shape[0]

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool = False) -> QuantLinear:
        """A product over [outputs, inputs], with `name`.bias where the file has one or it must be there."""
        tensor = self._take(f"{name}.weight", (outputs, inputs))
        there = bias or f"{name}.bias" in self._tensors
        numbers = self._numbers(f"{name}.bias", outputs) if there else None
        return QuantLinear(tensor, numbers)

    def embedding(self, name: str, rows: int, width: int) -> QuantEmbedding:
        """A table [rows, width]."""
        return QuantEmbedding(self._take(f"{name}.weight", (rows, width)))

    def norm(self, name: str, width: int, epsilon: float) -> RMSNorm:
        """A norm with the factors [width]."""
        return RMSNorm(self._numbers(f"{name}.weight", width), epsilon)

    def factors(self, name: str, count: int) -> Tensor | None:
        """Numbers [count] as float32, or None where the file has no tensor `name`.weight."""
        return self._numbers(f"{name}.weight", count) if self.has(name) else None

    def refuse_unused(self) -> None:
        """Raise if the file has a tensor that no layer took: the model would not be the file's."""
        unused = sorted(set(self._tensors) - self._used)
        if unused:
            raise ModelFileError(
                f"{self._file_name} has {len(unused)} tensors that lichen does not know for this "
                f"architecture, such as {unused[0]}."
            )

    def _numbers(self, name: str, count: int) -> Tensor:
        tensor = self._take(name, (count,))
        out = torch.empty(count)
        ggml.dequantize(tensor.type, tensor.data, out.numpy())
        return out

    def _take(self, name: str, shape: tuple[int, ...]) -> GGUFTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self._file_name} has no tensor {name}.")
        if tensor.shape != shape:
            raise ModelFileError(
                f"{self._file_name}: {name} has the shape {list(tensor.shape)}, "
                f"but its metadata promises {list(shape)}."
            )
        if tensor.type not in ggml.DEQUANTIZABLE:
            raise ModelFileError(
                f"{self._file_name}: {name} is stored as {tensor.type.name}, which cannot be dequantized."
            )
        self._used.add(name)
        return tensor
