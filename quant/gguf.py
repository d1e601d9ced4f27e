"""Reads and writes GGUF files: metadata with its types, tensors as views of the mapped file.

Reading copies nothing: a tensor's `data` is the file's own page cache. A split file (`-00001-of-00003`)
reads as one, whichever of its parts is named. Writing streams, and the file gets its name only when it is
whole and has passed the check that every other file must pass. `write_split` writes parts.

Invariants: nothing of a file is used before `gguf_header.py` (and, for a model, `gguf_check.py`) has
checked it. Views stay valid after `close`: the mapping ends with the last of them.
Not covered: big-endian files. A file that another process cuts short while it is mapped
ends this one (SIGBUS), as with any mapping; lichen's store never changes a file in place.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import numpy.typing as npt

from lichen.errors import ModelFileError
from lichen.quant.formats import INTEGERS, GGMLType, ValueType, row_bytes
from lichen.quant.gguf_check import check_model
from lichen.quant.gguf_header import Header, HeaderValue, TensorSpan, read_header
from lichen.quant.gguf_split import SPLIT_KEYS, write_split
from lichen.quant.gguf_values import Metadata, Value
from lichen.quant.gguf_write import write_gguf

__all__ = [
    "GGMLType",
    "GGUFFile",
    "GGUFTensor",
    "Value",
    "ValueType",
    "open_gguf",
    "write_gguf",
    "write_split",
]

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True, eq=False)
class GGUFTensor:
    """A stored tensor. shape: rows first, as torch and numpy see it (a file has its columns first).

    data: read-only uint8 of shape [rows_total, row_bytes], a view of the file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class GGUFFile:
    """An open file, or all parts of a split one; a context manager.

    metadata: the first part's, without what only says how it is split. tensors: of all parts, in the
    order of the files. parts: the files.
    """

    def __init__(self, path: Path, parts: list[_Part]) -> None:
        self.path = path
        self.parts = tuple(part.path for part in parts)
        own = parts[0].header.metadata
        kept = own if len(parts) == 1 else {key: own[key] for key in own if key not in SPLIT_KEYS}
        self._metadata: Metadata | None = Metadata(parts[0].data, kept)
        self._tensors = {span.name: _view(part.data, span) for part in parts for span in part.header.tensors}

    @property
    def metadata(self) -> Mapping[str, Value]:
        """Raises ModelFileError when the file is closed."""
        if self._metadata is None:
            raise ModelFileError(f"{self.path.name} is closed already.")
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """Raises ModelFileError when the file is closed."""
        if self._metadata is None:
            raise ModelFileError(f"{self.path.name} is closed already.")
        return self._tensors

    def close(self) -> None:
        """Let go of the mapping; it ends when the last view of it does. Idempotent."""
        self._metadata, self._tensors = None, {}

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Part(msgspec.Struct, frozen=True):
    path: Path
    data: mmap.mmap
    header: Header


def open_gguf(path: Path | str, *, model: bool = True) -> GGUFFile:
    """Map a file (and the other parts of a split one), check it, and make its contents readable.

    model: whether it must be one; False for adapters, importance matrices and the like, of which only the
    format is checked. O(header); the weights are not read.
    Raises ModelFileError that names what is wrong and where.
    """
    path = Path(path)
    first = _map(path)
    count = _whole_number(first, "split.count", default=1)
    parts = [first] if count <= 1 else _all_parts(first, count)
    if model:
        header = parts[0].header
        tensors = tuple(tensor for part in parts for tensor in part.header.tensors)
        check_model(msgspec.structs.replace(header, tensors=tensors))
    return GGUFFile(path, parts)


def _map(path: Path) -> _Part:
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file.")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelFileError(f"{path.name} is not a GGUF: it has only 0 bytes.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    return _Part(path, data, read_header(data, path.name))


def _view(data: mmap.mmap, span: TensorSpan) -> GGUFTensor:
    width = row_bytes(span.type, span.shape[0])
    flat = np.frombuffer(data, np.uint8, span.size, span.start)
    return GGUFTensor(span.name, span.type, span.shape[::-1], flat.reshape(-1, width))


# ---- split files ----------------------------------------------------------------------------------


def _all_parts(named: _Part, count: int) -> list[_Part]:
    """Every part, in order, when they agree with their names and with each other."""
    found = _PART.fullmatch(named.path.name)
    if found is None or int(found["count"]) != count:
        raise named.header.wrong(f"it says that it is one of {count} parts, but its name does not")
    paths = [
        named.path.with_name(f"{found['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    for number, path in enumerate(paths, 1):
        if not path.is_file():
            raise ModelFileError(
                f"Part {number} of {count} is missing: {path}.", hint="Put all parts into one folder."
            )
    parts = [named if path == named.path else _map(path) for path in paths]
    names: set[str] = set()
    for number, part in enumerate(parts):
        if (told := _whole_number(part, "split.no")) != number:
            raise part.header.wrong(f"it is part {number + 1} by its name, but {told + 1} by its metadata")
        if (other := _whole_number(part, "split.count")) != count:
            raise part.header.wrong(f"it is one of {other} parts, but {named.path.name} says {count}")
        own = {tensor.name for tensor in part.header.tensors}
        if twice := names & own:
            raise part.header.wrong(f"tensor {min(twice)} is in an earlier part already")
        names |= own
    total = _whole_number(parts[0], "split.tensors.count")
    if total != len(names):
        raise parts[0].header.wrong(f"its parts should have {total} tensors together, but have {len(names)}")
    return parts


def _whole_number(part: _Part, key: str, default: int | None = None) -> int:
    value: HeaderValue | None = part.header.metadata.get(key)
    if value is None and default is not None:
        return default
    if value is None or value.type not in INTEGERS or not isinstance(value.content, int):
        raise part.header.wrong(f"{key} is missing or no whole number")
    return value.content
