"""Adapters of random numbers over a model's file, without torch, and a registry that has some."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from lichen.adapters.registry import Registry
from lichen.adapters.versions import Lineage, Version
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import open_gguf, write_gguf
from lichen.quant.gguf_write import TensorItem


def write_made(
    path: Path,
    model: Path,
    seed: int,
    *,
    rank: int = 4,
    strength: float = 0.1,
    kind: GGMLType = GGMLType.F32,
    blocks: range | None = None,
    tensors: dict[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """An adapter that changes much on the layers of some blocks (None: the upper half). tensors: put in the
    place of, or beside, what is made; None in it leaves one out. metadata: the same, with _ for a dot.
    """
    random = np.random.default_rng(seed)
    items: dict[str, TensorItem] = {}
    with open_gguf(model) as file:
        architecture = str(file.metadata["general.architecture"].content)
        count = int(file.metadata[f"{architecture}.block_count"].content)
        for name, tensor in file.tensors.items():
            block = int(name.split(".")[1]) if name.startswith("blk.") else -1
            if len(tensor.shape) != 2 or block not in (blocks or range(count // 2, count)):
                continue
            outputs, inputs = tensor.shape
            a = random.standard_normal((rank, inputs)) / inputs**0.5
            b = random.standard_normal((outputs, rank)) * strength
            for end, numbers in (("a", a), ("b", b)):
                part = f"{name}.lora_{end}"
                items[part] = (part, kind, numbers.shape, stored(numbers, kind))
    for name, item in (tensors or {}).items():
        items.pop(name, None)
        if item is not None:
            items[name] = item
    said = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
        **{key.replace("_", "."): value for key, value in metadata.items()},
    }
    write_gguf(path, {key: value for key, value in said.items() if value is not None}, list(items.values()))
    return path


def stored(numbers: Any, kind: GGMLType) -> Any:
    """Numbers as the bytes of a type."""
    if kind is GGMLType.F16:
        return numbers.astype(np.float16)
    single = np.ascontiguousarray(numbers, np.float32)
    return (single.view(np.uint32) >> 16).astype(np.uint16) if kind is GGMLType.BF16 else single


def sha256(path: Path) -> str:
    """Of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_made(registry: Registry, name: str, model: Path, seed: int, **options: Any) -> Version:
    """A made adapter as a version of `name`; it does not serve yet."""
    registry.folder.mkdir(parents=True, exist_ok=True)
    file = write_made(registry.folder / f".made-{seed}.gguf", model, seed, **options)
    try:
        return registry.add(name, file, Lineage(base=sha256(model)), model=model)
    finally:
        file.unlink()
