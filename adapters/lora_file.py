"""Adapters as files: GGUF for llama.cpp, as `convert_lora_to_gguf.py` there writes them.

Tensors are `<layer>.weight.lora_a` [rank, inputs] and `.lora_b` [outputs, rank] in float32. llama.cpp
multiplies with alpha / rank, so a rank-stabilized adapter is written with alpha sqrt(rank), and a layer whose
rank is another than the others' has the quotient in its B. Layers of rank 0 are left out.
The file says which bytes it was trained over (`lichen.base.sha256`): over others it would be untested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lichen.adapters.lora import adapted
from lichen.adapters.task import LoRAOptions
from lichen.errors import ModelFileError
from lichen.models.decoder import Decoder
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor, open_gguf, write_gguf
from lichen.quant.gguf_write import TensorItem


def write_adapter(model: Decoder, path: Path, options: LoRAOptions, *, name: str, base: str) -> None:
    """Write the adapters in a model. base: sha256 of the model's file, hex. Raises what `write_gguf` does."""
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": model.file.metadata["general.architecture"].content,
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(options.scale * options.rank),
        "lichen.base.sha256": base,
    }
    tensors: list[TensorItem] = []
    for layer, module in adapted(model):
        a, b = module.a.detach(), module.b.detach()
        if module.settled is not None:
            a, b = module.factors()
            b = b * (len(a) / (options.scale * options.rank))
        for part, values in (("a", a), ("b", b)) if len(a) else ():
            numbers = values.cpu().contiguous().numpy()
            tensors.append((f"{layer}.weight.lora_{part}", GGMLType.F32, numbers.shape, numbers))
    write_gguf(path, metadata, tensors)


def read_adapter(model: Decoder, path: Path) -> None:
    """Put the numbers of an adapter's file into adapters of the same form that are in a model.

    Raises ModelFileError for a file that is no adapter, or one of another form.
    """
    with open_gguf(path, model=False) as file:
        if "adapter.type" not in file.metadata or file.metadata["adapter.type"].content != "lora":
            raise ModelFileError(f"{path.name} is no LoRA adapter.")
        tensors = dict(file.tensors)
        for layer, module in adapted(model):
            for part, values in (("a", module.a), ("b", module.b)):
                stored = tensors.pop(f"{layer}.weight.lora_{part}", None)
                if stored is None or stored.shape != tuple(values.shape) or stored.type != GGMLType.F32:
                    raise ModelFileError(f"{path.name} does not fit the adapter on {layer}.")
                numbers = stored.data.view(np.float32).reshape(stored.shape).copy()
                values.data.copy_(torch.from_numpy(numbers))
        if tensors:
            raise ModelFileError(f"{path.name} adapts {min(tensors)}, which is not adapted here.")


def settle_adapter(model: Decoder, path: Path) -> None:
    """Put an adapter's file under the adapters in a model, as what earlier lessons left.

    Raises ModelFileError for a file that is no adapter, or adapts what is not adapted here.
    """
    with open_gguf(path, model=False) as file:
        if "adapter.type" not in file.metadata or file.metadata["adapter.type"].content != "lora":
            raise ModelFileError(f"{path.name} is no LoRA adapter.")
        alpha = float(file.metadata["adapter.lora.alpha"].content)
        tensors = dict(file.tensors)
        for layer, module in adapted(model):
            a, b = (tensors.pop(f"{layer}.weight.lora_{part}", None) for part in "ab")
            if a is None and b is None:
                continue
            inner, outer = module.layer.in_features, module.layer.out_features
            fits = a is not None and b is not None and a.shape[1:] == (inner,) and b.shape[:1] == (outer,)
            if not fits or a is None or b is None or b.shape[1:] != a.shape[:1]:
                raise ModelFileError(f"{path.name} does not fit the adapter on {layer}.")
            module.settle(_numbers(a), _numbers(b) * (alpha / a.shape[0]))
        if tensors:
            raise ModelFileError(f"{path.name} adapts {min(tensors)}, which is not adapted here.")


def _numbers(tensor: GGUFTensor) -> torch.Tensor:
    """float32, of the tensor's shape. Raises ModelFileError for another type."""
    if tensor.type != GGMLType.F32:
        raise ModelFileError(f"{tensor.name} is stored as {tensor.type.name}, not F32.")
    return torch.from_numpy(tensor.data.view(np.float32).reshape(tensor.shape).copy())
