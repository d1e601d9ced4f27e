"""A model with only its first layers: embedding, a few blocks, output; to measure what a layer costs.

Everything but the number of layers is the model's own: the shapes, the types, the vocabulary. Its text is
nonsense. A model of two lengths tells the cost of a layer by the difference, and of all else by the rest.
Not covered: what a layer costs where layers are of different kinds and the first ones stand for no others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lichen.errors import ModelFileError
from lichen.quant.choice import plan_for, stored_bytes, type_named
from lichen.quant.formats import INTEGERS, GGMLType, ValueType
from lichen.quant.gguf import GGUFFile, GGUFTensor, Value, write_gguf
from lichen.quant.quantize import stored_pieces

_BLOCK = re.compile(r"blk\.(\d+)\.")


def layer_of(tensor: GGUFTensor) -> int | None:
    """The layer that a tensor belongs to; None for embedding, output and their like."""
    found = _BLOCK.match(tensor.name)
    return int(found[1]) if found else None


def layer_count(file: GGUFFile) -> int:
    """Layers of a model. Raises ModelFileError where its metadata does not say."""
    value = file.metadata.get(f"{_architecture(file)}.block_count")
    if value is None or value.type not in INTEGERS or value.content < 1:
        raise ModelFileError(f"{file.path.name} does not say how many layers it has.")
    return int(value.content)


def types_of(file: GGUFFile, layout: str | None) -> dict[str, GGMLType]:
    """The type of each tensor when all matrices are stored as `layout` (such as q8_0), as far as it fits.

    None: as they are. Raises ConfigError for a name of no type.
    """
    if layout is None:
        return {name: tensor.type for name, tensor in file.tensors.items()}
    return dict(plan_for(file.tensors.values(), type_named(layout)).types)


def layer_bytes(file: GGUFFile, types: Mapping[str, GGMLType], layers: int) -> int:
    """Bytes that the first `layers` layers are stored in."""
    return sum(
        stored_bytes(tensor, types[name])
        for name, tensor in file.tensors.items()
        if (layer := layer_of(tensor)) is not None and layer < layers
    )


def write_cut(file: GGUFFile, target: Path, types: Mapping[str, GGMLType], layers: int) -> None:
    """Write the model with its first `layers` layers, each tensor as its type in `types`.

    Raises ModelFileError for more layers than it has, and what `write_gguf` and `stored_pieces` do.
    """
    whole = layer_count(file)
    if not 1 <= layers <= whole:
        raise ModelFileError(f"{file.path.name} has {whole} layers, so that it cannot be cut to {layers}.")
    kept = [
        tensor for tensor in file.tensors.values() if (layer := layer_of(tensor)) is None or layer < layers
    ]
    write_gguf(
        target,
        _metadata(file, whole, layers),
        [
            (
                tensor.name,
                types[tensor.name],
                tensor.shape,
                lambda tensor=tensor: stored_pieces(tensor, types[tensor.name], None),
            )
            for tensor in kept
        ],
    )


def _architecture(file: GGUFFile) -> str:
    value = file.metadata.get("general.architecture")
    return str(value.content) if value is not None else ""


def _metadata(file: GGUFFile, whole: int, layers: int) -> dict[str, Value]:
    """The model's own, with fewer layers; a list that has an entry a layer loses those of the others."""
    prefix = f"{_architecture(file)}."
    metadata = dict(file.metadata)
    for key, value in file.metadata.items():
        if key == f"{prefix}block_count":
            metadata[key] = Value(value.type, layers)
        elif key.startswith(prefix) and value.type == ValueType.ARRAY and len(value.content) == whole:
            metadata[key] = Value(value.type, value.content[:layers], value.item_type)
    return metadata
