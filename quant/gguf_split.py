"""Writes a model in parts, as llama.cpp's gguf-split names and marks them; `gguf.py` reads them as one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lichen.durable import sync_folder
from lichen.errors import ModelFileError, StoreError
from lichen.quant.formats import ValueType
from lichen.quant.gguf_values import Value
from lichen.quant.gguf_write import TensorItem, padded_bytes, settled_alignment, write_gguf

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
MOST_PARTS = (1 << 16) - 1  # their number is a UINT16


def write_split(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorItem],
    *,
    part_bytes: int,
    alignment: int | None = None,
) -> list[Path]:
    """Write `model.gguf` as `model-00001-of-00003.gguf` and so on; returns the paths of the parts.

    Arguments are those of `write_gguf`, but the tensors must be a list. part_bytes: of tensors in a part; one
    that is larger has a part to itself. All metadata is in the first part. What fits into one part becomes
    `path` itself. The parts get their names when all of them are whole, the first one last.
    Raises ModelFileError for a size that makes no parts or too many, and what `write_gguf` does.
    """
    values = {key: Value.of(content) for key, content in metadata.items() if key not in SPLIT_KEYS}
    alignment = settled_alignment(values, alignment)
    parts = _parts(tensors, part_bytes, alignment)
    if len(parts) == 1:
        write_gguf(path, values, tensors, alignment=alignment)
        return [path]
    if len(parts) > MOST_PARTS:
        raise ModelFileError(
            f"Parts of {part_bytes:,} bytes would be {len(parts):,} files, more than {MOST_PARTS:,}.",
            hint="Make the parts larger.",
        )
    names = [f"{path.stem}-{number:05d}-of-{len(parts):05d}.gguf" for number in range(1, len(parts) + 1)]
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            for number, (name, part) in enumerate(zip(names, parts, strict=True)):
                marks = _marks(number, len(parts), len(tensors))
                own = values | marks if number == 0 else marks
                write_gguf(Path(folder) / name, own, part, alignment=alignment)
            for name in reversed(names):
                (Path(folder) / name).replace(path.with_name(name))
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
    return [path.with_name(name) for name in names]


def _parts(tensors: Sequence[TensorItem], part_bytes: int, alignment: int) -> list[list[TensorItem]]:
    """The tensors in their order, `part_bytes` or less together, or a single one."""
    if part_bytes < 1:
        raise ModelFileError(f"Parts of {part_bytes:,} bytes hold nothing.", hint="Make the parts larger.")
    parts: list[list[TensorItem]] = [[]]
    room, names = part_bytes, set[str]()
    for tensor in tensors:
        if tensor[0] in names:  # `write_gguf` sees only those of a part
            raise ModelFileError(f"The tensor {tensor[0]} is there twice.")
        names.add(tensor[0])
        size = padded_bytes(tensor, alignment)
        if size > room and parts[-1]:
            parts.append([])
            room = part_bytes
        parts[-1].append(tensor)
        room -= size
    return parts


def _marks(number: int, count: int, tensors: int) -> dict[str, Value]:
    """What a part says of itself, with the types that llama.cpp gives it."""
    return {
        "split.no": Value(ValueType.UINT16, number),
        "split.count": Value(ValueType.UINT16, count),
        "split.tensors.count": Value(ValueType.INT32, tensors),
    }
