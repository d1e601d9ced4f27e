"""From a torch model back to a GGUF: what was not touched keeps its bytes.

A tensor counts as touched when its layer was replaced (by `QuantLinear.dense()` or
`QuantEmbedding.dense()`, to train it) or, for the small float vectors, when its values changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lichen.errors import TensorError
from lichen.models.decoder import Decoder
from lichen.quant import ggml
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor, write_gguf
from lichen.quant.linear import QuantEmbedding, QuantLinear

Choose: TypeAlias = Callable[[str, GGMLType], GGMLType]
"""From a tensor's name and its type in the model's file to the type to write."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]


def export_model(model: Decoder, path: Path, *, choose: Choose = lambda _name, kind: kind) -> None:
    """Write the model with the metadata of its file.

    Tensors are quantized again only where they were touched or where `choose` changes the type; all else
    is copied byte for byte, in the file's order. An output matrix that was tied to the embedding and then
    replaced becomes a tensor of its own.
    Raises TensorError when a layer is neither stored nor an ordinary torch layer (merge adapters first)
    or its values do not fit the type, and what `write_gguf` raises.
    """
    write_gguf(path, model.file.metadata, _tensors(model, choose))


def _tensors(model: Decoder, choose: Choose) -> Iterator[tuple[str, GGMLType, tuple[int, ...], _Bytes]]:
    for tensor in model.file.tensors.values():
        touched = _touched(model, tensor)
        kind = choose(tensor.name, tensor.type)
        if touched is None and kind == tensor.type:
            yield tensor.name, tensor.type, tensor.shape, tensor.data
            continue
        values = touched if touched is not None else _dequantized(tensor)
        yield tensor.name, kind, tensor.shape, _quantized(values, kind, tensor.name)
    output: nn.Module = model.get_submodule("output")  # whatever stands there now
    if "output.weight" not in model.file.tensors and isinstance(output, nn.Linear):
        kind = choose("output.weight", model.file.tensors["token_embd.weight"].type)
        weight = output.weight.detach()
        yield "output.weight", kind, tuple(weight.shape), _quantized(weight, kind, "output.weight")


def _touched(model: Decoder, tensor: GGUFTensor) -> Tensor | None:
    """The values of a tensor in the model where they are no longer the file's; float32."""
    if tensor.name == "rope_freqs.weight":
        return None  # read into a table, never trained
    module_name, _, part = tensor.name.rpartition(".")
    module = model.get_submodule(module_name)
    if part == "weight" and isinstance(module, QuantLinear | QuantEmbedding):
        return None if module.tensor is tensor else module.dense().weight.detach()
    values = getattr(module, part, None)
    if not isinstance(values, Tensor) or tuple(values.shape) != tensor.shape:
        raise TensorError(
            f"{tensor.name} cannot be written: its layer is a {type(module).__name__}.",
            hint="Merge the adapter into the layer's weights first.",
        )
    values = values.detach().to("cpu", torch.float32)
    return None if len(tensor.shape) == 1 and torch.equal(values, _dequantized(tensor)) else values


def _dequantized(tensor: GGUFTensor) -> Tensor:
    out = torch.empty(tensor.shape)
    ggml.dequantize(tensor.type, tensor.data, out.numpy())
    return out


def _quantized(values: Tensor, kind: GGMLType, name: str) -> _Bytes:
    numbers = values.to("cpu", torch.float32).contiguous()
    out = np.empty((numbers.numel() // numbers.shape[-1], ggml.row_bytes(kind, numbers.shape[-1])), np.uint8)
    try:
        ggml.quantize(kind, numbers.numpy(), out)
    except TensorError as error:
        raise TensorError(
            f"{name} cannot be written as {kind.name}: {error.message}", hint=error.hint
        ) from error
    return out
