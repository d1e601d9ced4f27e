"""How much each column of each matrix matters: the mean of its squared inputs over a calibration text.

Files are llama.cpp's importance matrices in their GGUF form (tools/imatrix/README.md there), so that
either program can use what the other gathered. Not covered: the older `.dat` form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lichen.errors import ModelFileError
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor, open_gguf, write_gguf

FLOOR = 1e-4  # of a matrix' mean: no column counts for nothing, as a text that it does matter in may come

Weights = npt.NDArray[np.float32]


class Importance(Mapping[str, Weights]):
    """By name of the tensor: float32 [matrices, columns], one row but for tensors of several experts.

    tokens: how many inputs the means are over. chunk: tokens of one stretch of text.
    """

    def __init__(self, means: Mapping[str, Weights], *, tokens: int, chunk: int, text: str = "") -> None:
        self._means = dict(means)
        self.tokens, self.chunk, self.text = tokens, chunk, text

    def __getitem__(self, name: str) -> Weights:
        return self._means[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)

    def of(self, tensor: GGUFTensor, row: int = 0) -> Weights | None:
        """The weights [columns] for a row of a tensor, each above 0; None where there are none.

        Raises ModelFileError when they are of another model.
        """
        means = self._means.get(tensor.name)
        if means is None:
            return None
        matrices = math.prod(tensor.shape[:-2])
        if means.shape[1] != tensor.shape[-1] or means.shape[0] not in (1, matrices):
            raise ModelFileError(
                f"The importance of {tensor.name} is for {list(means.shape)} columns, but the tensor has "
                f"the shape {list(tensor.shape)}: it was gathered from another model."
            )
        chosen: Weights = means[0 if len(means) == 1 else row // tensor.shape[-2]]
        if not chosen.any():  # an expert that the text never chose
            return np.ones_like(chosen)
        floor = np.float32(FLOOR * float(chosen.mean()))
        return np.maximum(chosen, floor)


def save_importance(importance: Importance, path: Path) -> None:
    """Write a file that llama.cpp's `--imatrix` takes. Raises what `write_gguf` raises."""
    tensors: list[tuple[str, GGMLType, tuple[int, ...], Any]] = []
    for name, means in importance.items():
        sums = np.ascontiguousarray(means * np.float32(importance.tokens))
        counts = np.full((len(means), 1), importance.tokens, np.float32)
        tensors.append((f"{name}.in_sum2", GGMLType.F32, sums.shape, sums))
        tensors.append((f"{name}.counts", GGMLType.F32, counts.shape, counts))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [importance.text or "calibration"],
        "imatrix.chunk_count": max(1, importance.tokens // max(1, importance.chunk)),
        "imatrix.chunk_size": importance.chunk,
    }
    write_gguf(path, metadata, tensors)


def load_importance(path: Path) -> Importance:
    """Read a file of lichen's or llama.cpp's. Raises ModelFileError unless it is a sound one."""
    with open_gguf(path, model=False) as file:
        kind = file.metadata.get("general.type")
        if kind is None or kind.content != "imatrix":
            raise ModelFileError(
                f"{path.name} is no importance matrix: its general.type is not imatrix.",
                hint="Make one with lichen quantize --save-importance, or with llama-imatrix.",
            )
        means: dict[str, Weights] = {}
        tokens = 0
        for name, sums in file.tensors.items():
            if not name.endswith(".in_sum2"):
                continue
            base = name.removesuffix(".in_sum2")
            counts = _numbers(path, file.tensors.get(f"{base}.counts"), base)
            total = _numbers(path, sums, base)
            if counts.size != len(total) or (counts < 0).any() or (total < 0).any():
                raise ModelFileError(f"{path.name}: the sums and counts of {base} do not fit each other.")
            means[base] = (total / np.maximum(counts.reshape(-1, 1), 1)).astype(np.float32)
            tokens = max(tokens, int(counts.max()))
        chunk = file.metadata.get("imatrix.chunk_size")
        size = chunk.content if chunk is not None and isinstance(chunk.content, int) else 512
    if not means:
        raise ModelFileError(f"{path.name} is an importance matrix without any tensor.")
    return Importance(means, tokens=tokens, chunk=size, text=path.name)


def _numbers(path: Path, tensor: GGUFTensor | None, name: str) -> Weights:
    """A copy of a tensor's numbers [rows, columns]."""
    if tensor is None or tensor.type is not GGMLType.F32 or len(tensor.shape) > 2:
        raise ModelFileError(f"{path.name}: the sums or counts of {name} are missing or not F32.")
    numbers = tensor.data.view(np.float32).reshape(-1, tensor.shape[-1]).copy()
    if not np.isfinite(numbers).all():
        raise ModelFileError(f"{path.name}: the sums or counts of {name} hold inf or nan.")
    return numbers
