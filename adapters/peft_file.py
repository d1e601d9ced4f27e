"""Adapters in PEFT's form: a folder with adapter_config.json and adapter_model.safetensors, out and in.

PEFT names a layer by its module (`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`), and its
rows are in the order of Hugging Face's checkpoint. A GGUF of the Llama family has the rows of q and k in
another order (llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.permute`: the two halves of each head, which
rotate together, are interleaved), so B of those two is permuted on the way out and back on the way in. A is
never touched: it sees the layer's inputs.
Invariant: what is written here reads back to the same numbers. The result of an import still passes
`quant/adapter_check.py` before anything uses it.
Not covered: other layers than the seven linear ones of a block, DoRA, trained biases and embeddings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from lichen.adapters.compare import Matrix, read_factors
from lichen.durable import sync_folder, write_file
from lichen.errors import AdapterError, StoreError
from lichen.quant.adapter_check import HEADS, head_counts
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import open_gguf, write_gguf

if TYPE_CHECKING:
    from lichen.quant.gguf_write import TensorItem

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG = 1 << 20  # bytes
MAX_WEIGHTS = 1 << 31  # bytes
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PERMUTED = frozenset({"llama"})  # architectures whose q and k rows a GGUF has in another order
FAMILIES = frozenset({"llama", "qwen2", "qwen3", "gemma3"})
_TENSOR = re.compile(r"blk\.(\d+)\.([a-z_]+)\.weight")
_MODULE = re.compile(r"(?:[a-z_]+\.){0,4}layers\.(\d{1,4})\.((?:self_attn|mlp)\.[a-z]+_proj)")
_LAYERS = {module: layer for layer, module in MODULES.items()}


class PeftConfig(msgspec.Struct, kw_only=True):
    """The part of adapter_config.json that decides what an adapter computes; the rest is left alone."""

    peft_type: str
    r: Annotated[int, Meta(ge=1, le=4096)]
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)]
    rank_pattern: dict[str, Annotated[int, Meta(ge=1, le=4096)]] = {}
    alpha_pattern: dict[str, Annotated[float, Meta(gt=0, le=1e6)]] = {}
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False

    def scale(self, module: str, rank: int) -> float:
        """What PEFT multiplies B A of a module with, whose A has `rank` rows. Raises AdapterError."""
        if rank != (wanted := _pattern(self.rank_pattern, module, self.r)):
            raise AdapterError(f"{module} has the rank {rank}, but {CONFIG} says {wanted}.")
        alpha = _pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


N = TypeVar("N", int, float)


def _pattern(patterns: Mapping[str, N], module: str, default: N) -> N:
    """PEFT takes the first key that a module's name ends with; as a whole name here, not as an expression."""
    return next((value for key, value in patterns.items() if f".{module}".endswith(f".{key}")), default)


def copy_out(file: Path, path: Path) -> None:
    """Copy a version's GGUF to a path, whole or not at all. Raises StoreError."""
    try:
        write_file(path, file.read_bytes())
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from error


def write_peft(file: Path, folder: Path, *, heads: tuple[int, int], base_name: str = "") -> None:
    """Write an adapter's GGUF as a folder that `PeftModel.from_pretrained` loads. The folder must be new.

    heads: the model's, of q and of k. Raises AdapterError for a family or a layer without a name there,
    StoreError when it cannot be written.
    """
    from safetensors.numpy import save_file

    with open_gguf(file, model=False) as gguf:
        architecture = str(gguf.metadata["general.architecture"].content)
        alpha = float(gguf.metadata["adapter.lora.alpha"].content)
    _known_family(architecture)
    tensors: dict[str, Matrix] = {}
    ranks: dict[str, int] = {}
    for name, factors in read_factors(file).items():
        module, layer = _module(name)
        count = _turned(architecture, layer, heads)
        b = _swapped(factors.b, count, halves_first=False) if count else factors.b
        ranks[module] = factors.a.shape[0]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(factors.a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": common,
        "lora_alpha": alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != common},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_file(folder / CONFIG, json.dumps(config, indent=2).encode())
        sync_folder(folder.parent)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}.") from error


def read_peft(folder: Path, target: Path, *, model: Path) -> Path:
    """Write a PEFT folder as a GGUF for a model's file; the target.

    Raises AdapterError for whatever lichen cannot serve as it is.
    """
    config = _config(folder)
    with open_gguf(model) as file:
        architecture = str(file.metadata["general.architecture"].content)
        _known_family(architecture)
        said = {key: file.metadata.get(f"{architecture}.attention.{key}") for key in HEADS}
    heads = head_counts({key: value.content for key, value in said.items() if value is not None})
    items: list[TensorItem] = []
    for module, (a, b) in sorted(_pairs(folder / WEIGHTS).items()):
        name, layer = _tensor(module)
        scaled = b * (config.scale(module, a.shape[0]) * a.shape[0] / config.lora_alpha)
        if count := _turned(architecture, layer, heads):
            scaled = _swapped(scaled, count, halves_first=True)
        for end, numbers in (("a", a), ("b", scaled)):
            part = f"{name}.weight.lora_{end}"
            items.append((part, GGMLType.F32, numbers.shape, np.ascontiguousarray(numbers, np.float32)))
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(config.lora_alpha),
    }
    write_gguf(target, metadata, items)
    return target


def _known_family(architecture: str) -> None:
    if architecture not in FAMILIES:
        raise AdapterError(f"Layers of the kind {architecture!r} have no names in PEFT that lichen knows.")


def _module(name: str) -> tuple[str, str]:
    """PEFT's name of a tensor's module, and the layer's name in a GGUF. Raises AdapterError."""
    found = _TENSOR.fullmatch(name)
    if found is None or found[2] not in MODULES:
        raise AdapterError(f"The adapter stands on {name}, for which PEFT has no name that lichen knows.")
    return f"model.layers.{found[1]}.{MODULES[found[2]]}", found[2]


def _tensor(module: str) -> tuple[str, str]:
    """The name of a PEFT module in a GGUF, and of its layer alone. Raises AdapterError."""
    found = _MODULE.fullmatch(module)
    if found is None or found[2] not in _LAYERS:
        raise AdapterError(f"The adapter stands on {module}, which is none of a block's linear layers.")
    return f"blk.{int(found[1])}.{_LAYERS[found[2]]}", _LAYERS[found[2]]


def _turned(architecture: str, layer: str, heads: tuple[int, int]) -> int:
    """Heads of a layer whose rows a GGUF has in another order; 0 for a layer that is the same in both."""
    if architecture not in PERMUTED:
        return 0
    return {"attn_q": heads[0], "attn_k": heads[1]}.get(layer, 0)


def _swapped(b: Matrix, heads: int, *, halves_first: bool) -> Matrix:
    """B [outputs, rank] with the rows of each head in the other order.

    halves_first: from a checkpoint's order, where the first halves of the pairs that rotate come first, to a
    file's, where each pair stands together; False for the way back. Raises AdapterError.
    """
    rows, rank = b.shape
    if rows % (2 * heads):
        raise AdapterError(f"{rows} rows cannot belong to {heads} attention heads.")
    shape = (heads, 2, -1, rank) if halves_first else (heads, -1, 2, rank)
    return np.ascontiguousarray(b.reshape(shape).swapaxes(1, 2).reshape(rows, rank))


def _config(folder: Path) -> PeftConfig:
    """Raises AdapterError for a folder that is none of PEFT's, or holds more than a plain LoRA."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise AdapterError(f"{CONFIG} is larger than {MAX_CONFIG:,} bytes.")
        config = msgspec.json.decode(path.read_bytes(), type=PeftConfig)
    except OSError as error:
        raise AdapterError(f"{folder} has no {CONFIG} that can be read: {error.strerror}.") from None
    except msgspec.MsgspecError as error:
        raise AdapterError(f"{CONFIG} is not as PEFT writes it: {error}.") from None
    other = [name for name in ("use_dora", "fan_in_fan_out", "modules_to_save") if getattr(config, name)]
    if config.peft_type != "LORA" or config.bias != "none" or other:
        what = other[0] if other else config.peft_type if config.peft_type != "LORA" else "bias"
        raise AdapterError(f"lichen serves plain LoRA adapters; this one has {what}.")
    return config


def _pairs(path: Path) -> dict[str, tuple[Matrix, Matrix]]:
    """A [rank, inputs] and B [outputs, rank] in float32 by module. Raises AdapterError."""
    import safetensors

    try:
        if path.stat().st_size > MAX_WEIGHTS:
            raise AdapterError(f"{path.name} is larger than {MAX_WEIGHTS:,} bytes.")
        entries = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from None
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path.name} is no sound safetensors file: {error}.") from None
    parts: dict[str, dict[str, Matrix]] = {}
    for name, entry in entries:
        module, dot, end = name.removeprefix(PREFIX).rpartition(".lora_")
        if not dot or end not in ("A.weight", "B.weight"):
            raise AdapterError(f"{path.name} holds {name}, which is no part of a plain LoRA adapter.")
        parts.setdefault(module, {})[end[0]] = _numbers(name, entry)
    pairs: dict[str, tuple[Matrix, Matrix]] = {}
    for module, halves in parts.items():
        if set(halves) != {"A", "B"} or halves["A"].shape[0] != halves["B"].shape[1]:
            raise AdapterError(f"The two parts of the adapter on {module} do not fit each other.")
        pairs[module] = (halves["A"], halves["B"])
    return pairs


def _numbers(name: str, entry: Mapping[str, Any]) -> Matrix:
    kind, shape, data = str(entry["dtype"]), tuple(entry["shape"]), entry["data"]
    if kind not in ("F32", "F16", "BF16") or len(shape) != 2 or min(shape) < 1:
        raise AdapterError(f"{name} is {kind} of the shape {list(shape)}, not a matrix of F32, F16 or BF16.")
    if kind == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, np.float32 if kind == "F32" else np.float16).astype(np.float32).reshape(shape)
