"""Bits by layer, as bars in a terminal and as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.errors import ConfigError

if TYPE_CHECKING:
    from lichen.quant.formats import GGMLType
    from lichen.quant.gguf import GGUFFile

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")
WIDTH = 40  # characters of the longest bar


def bits_by_layer(file: GGUFFile, types: Mapping[str, GGMLType]) -> dict[str, tuple[float, str]]:
    """Of the embedding, each layer and the output: mean bits a weight, and how its weights are stored."""
    from lichen.quant.choice import is_matrix, stored_bytes

    sizes: dict[str, list[int]] = {}
    kinds: dict[str, dict[str, None]] = {}
    for name, tensor in file.tensors.items():
        if not is_matrix(tensor):
            continue
        found = _LAYER.fullmatch(name)
        row = f"layer {found[1]}" if found else name.removesuffix(".weight")
        total = sizes.setdefault(row, [0, 0])
        total[0] += stored_bytes(tensor, types[name])
        total[1] += math.prod(tensor.shape)
        kinds.setdefault(row, {})[types[name].name] = None
    return {row: (8 * size / weights, ", ".join(kinds[row])) for row, (size, weights) in sizes.items()}


def bars(file: GGUFFile, types: Mapping[str, GGMLType]) -> str:
    """One line a layer."""
    rows = bits_by_layer(file, types)
    most = max(bits for bits, _ in rows.values())
    left = max(map(len, rows))
    return "\n".join(
        f"{row:{left}} {bits:5.2f} {'█' * max(1, round(WIDTH * bits / most)):{WIDTH}} {kinds}"
        for row, (bits, kinds) in rows.items()
    )


def draw(file: GGUFFile, types: Mapping[str, GGMLType], path: Path) -> list[str]:
    """Write a picture, layers across and parts down; what there is to say about it. Raises ConfigError."""
    try:
        import matplotlib
    except ImportError:
        return [f"{path} was not drawn: matplotlib is not installed."]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from lichen.quant.choice import bits

    cells: dict[str, dict[int, float]] = {}
    for name, kind in types.items():
        if (found := _LAYER.fullmatch(name)) and len(file.tensors[name].shape) > 1:
            cells.setdefault(found[2], {})[int(found[1])] = bits(kind)
    parts = sorted(cells)
    layers = 1 + max((layer for row in cells.values() for layer in row), default=0)
    grid = [[cells[part].get(layer, float("nan")) for layer in range(layers)] for part in parts]
    figure: Any
    figure, axes = pyplot.subplots(figsize=(max(6, layers / 3), 1 + 0.35 * len(parts)), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(parts)), parts)
    axes.set_xlabel("layer")
    figure.colorbar(image, label="bits a weight")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be drawn: {error}.", hint="Take a name in .svg or .png.") from error
    finally:
        pyplot.close(figure)
    return []
