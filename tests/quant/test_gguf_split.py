"""Models in several files: read as one, written as one would be, and parts that lie or are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.errors import ModelFileError, StoreError
from lichen.quant.gguf import GGMLType, GGUFFile, Value, ValueType, open_gguf, write_gguf, write_split
from tests.quant.test_gguf import EMBEDDING, MODEL, NORM, Item, items


def split(folder: Path, **lies: Any) -> list[Path]:
    """A model in three parts, the second without tensors; lies: no1, count2, total1 and so on."""
    content: list[list[Item]] = [[EMBEDDING], [], [NORM]]
    paths = []
    for number, tensors in enumerate(content):
        metadata = {
            **(MODEL if number == 0 else {}),
            "split.no": Value(ValueType.UINT16, lies.get(f"no{number}", number)),
            "split.count": Value(ValueType.UINT16, lies.get(f"count{number}", 3)),
            "split.tensors.count": Value(ValueType.INT32, lies.get(f"total{number}", 2)),
        }
        paths.append(folder / f"tiny-{number + 1:05d}-of-00003.gguf")
        write_gguf(paths[-1], metadata, lies.get(f"tensors{number}", tensors))
    return paths


def test_a_split_file_reads_as_one(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, MODEL, [EMBEDDING, NORM])
    for path in split(tmp_path):
        merged = tmp_path / "merged.gguf"
        with open_gguf(path) as file:
            assert len(file.parts) == 3
            write_gguf(merged, file.metadata, items(file))
        assert merged.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("lies", "words"),
    [
        ({"count0": 65535}, "one of 65535 parts, but its name does not"),
        ({"count0": 2}, "one of 2 parts, but its name does not"),
        ({"count2": 4}, "one of 4 parts, but"),
        ({"no1": 2}, "part 2 by its name, but 3 by its metadata"),
        ({"total0": 3}, "should have 3 tensors together, but have 2"),
        ({"total0": -1}, "should have -1 tensors"),
        ({"tensors2": [EMBEDDING]}, "in an earlier part already"),
        ({"tensors0": [NORM], "tensors2": []}, "should have 2 tensors together, but have 1"),
    ],
)
def test_parts_that_lie_are_refused(tmp_path: Path, lies: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        open_gguf(split(tmp_path, **lies)[0])


def test_parts_that_are_missing_or_cut_or_misnamed_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    whole = paths[2].read_bytes()
    for length in (0, 30, len(whole) - 20):
        paths[2].write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match="tiny-00003"):
            open_gguf(paths[0])
    paths[2].unlink()
    with pytest.raises(ModelFileError, match="Part 3 of 3 is missing"):
        open_gguf(paths[0])
    paths[2].write_bytes(whole)
    with pytest.raises(ModelFileError, match="its name does not"):
        open_gguf(paths[0].rename(tmp_path / "model.gguf"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 1200), st.sampled_from([None, 64]))
def test_what_is_written_in_parts_reads_as_the_whole(
    tmp_path: Path, sizes: list[int], part_bytes: int, alignment: int | None
) -> None:
    tensors: list[Item] = [
        (f"t{number}", GGMLType.F32, (size,), np.full(size, number, np.float32))
        for number, size in enumerate(sizes)
    ]
    write_gguf(tmp_path / "whole.gguf", MODEL, tensors, alignment=alignment)
    paths = write_split(tmp_path / "parts.gguf", MODEL, tensors, part_bytes=part_bytes, alignment=alignment)
    for path in paths:
        with open_gguf(path, model=False) as file:
            assert list(file.parts) == paths
            held = [sum(one.data.nbytes for one in part) for part in by_part(file)]
            assert all(size <= max(part_bytes, 160) for size in held)
            write_gguf(tmp_path / "again.gguf", file.metadata, items(file))
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    for path in paths:
        path.unlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again.gguf", "whole.gguf"]


def by_part(file: GGUFFile) -> list[list[Any]]:
    """The tensors of each file."""
    found = []
    for part in file.parts:
        names = {str(name) for name in (tensor.name for tensor in gguf.GGUFReader(part).tensors)}
        found.append([tensor for name, tensor in file.tensors.items() if name in names])
    return found


def test_parts_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    many: list[Item] = [(f"t{number}", GGMLType.F32, (1,), bytes(4)) for number in range(3)]
    broken: list[Item] = [*many, ("t2", GGMLType.F32, (1,), bytes(4))]
    lying: list[Item] = [*many, ("t3", GGMLType.F32, (1,), lambda: [bytes(8)])]
    for tensors, size, words in (
        (many, 0, "hold nothing"),
        (many, -5, "hold nothing"),
        (lying, 64, "8 were given"),
        ([(f"t{number}", GGMLType.F32, (1,), bytes(4)) for number in range(1 << 16)], 1, "65,536 files"),
        (broken, 1 << 20, "tensor t2 is there twice"),
        (broken, 32, "tensor t2 is there twice"),
    ):
        with pytest.raises(ModelFileError, match=words):
            write_split(tmp_path / "model.gguf", {}, tensors, part_bytes=size)
    with pytest.raises(StoreError, match="cannot be written"):
        write_split(tmp_path / "missing" / "model.gguf", {}, many, part_bytes=32)
    assert list(tmp_path.iterdir()) == []
