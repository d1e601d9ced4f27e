"""Importance matrices: what is written is read, and what is no matrix is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lichen.errors import ModelFileError
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFTensor, write_gguf
from lichen.quant.importance import FLOOR, Importance, load_importance, save_importance

MEANS = np.array([[1.0, 0.0, 4.0, 0.5]], np.float32)


def tensor(shape: tuple[int, ...], name: str = "a.weight") -> GGUFTensor:
    rows = int(np.prod(shape[:-1]))
    return GGUFTensor(name, GGMLType.F32, shape, np.zeros((rows, shape[-1] * 4), np.uint8))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "importance.gguf"
    save_importance(Importance({"a.weight": MEANS}, tokens=96, chunk=32, text="book"), path)
    again = load_importance(path)
    assert again["a.weight"] == pytest.approx(MEANS)
    assert (again.tokens, again.chunk) == (96, 32)


def test_it_has_the_form_of_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "importance.gguf"
    save_importance(Importance({"a.weight": MEANS}, tokens=96, chunk=32, text="book"), path)
    reader = gguf.GGUFReader(path)
    found = {one.name: one.data for one in reader.tensors}
    assert found["a.weight.in_sum2"] == pytest.approx(MEANS * 96)
    assert found["a.weight.counts"].reshape(-1).tolist() == [96.0]
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 32


def test_no_column_counts_for_nothing() -> None:
    weights = Importance({"a.weight": MEANS}, tokens=1, chunk=1).of(tensor((3, 4)))
    assert weights is not None
    assert weights.tolist() == pytest.approx([1.0, FLOOR * MEANS.mean(), 4.0, 0.5])


def test_experts_have_rows_of_their_own() -> None:
    means = np.array([[1, 2], [0, 0]], np.float32)
    importance = Importance({"a.weight": means}, tokens=1, chunk=1)
    experts = tensor((2, 3, 2))
    first, second = importance.of(experts, 2), importance.of(experts, 3)
    assert first is not None and first.tolist() == [1, 2]
    assert second is not None and second.tolist() == [1, 1]  # the text never chose it


def test_of_another_model_is_an_error() -> None:
    importance = Importance({"a.weight": MEANS}, tokens=1, chunk=1)
    assert importance.of(tensor((3, 4), "b.weight")) is None
    with pytest.raises(ModelFileError, match="another model"):
        importance.of(tensor((3, 5)))


SUMS = ("a.in_sum2", GGMLType.F32, (1, 4), MEANS)
COUNTS = ("a.counts", GGMLType.F32, (1, 1), np.array([[2.0]], np.float32))


@pytest.mark.parametrize(
    ("metadata", "tensors", "sentence"),
    [
        ({"general.type": "model"}, [SUMS, COUNTS], "is no importance matrix"),
        ({}, [SUMS, COUNTS], "is no importance matrix"),
        ({"general.type": "imatrix"}, [SUMS], "missing or not F32"),
        ({"general.type": "imatrix"}, [COUNTS], "without any tensor"),
        (
            {"general.type": "imatrix"},
            [SUMS, ("a.counts", GGMLType.F32, (2, 1), np.ones((2, 1), np.float32))],
            "do not fit each other",
        ),
        (
            {"general.type": "imatrix"},
            [SUMS, ("a.counts", GGMLType.F32, (1, 1), np.array([[-1.0]], np.float32))],
            "do not fit each other",
        ),
        (
            {"general.type": "imatrix"},
            [("a.in_sum2", GGMLType.F32, (1, 4), np.full((1, 4), np.nan, np.float32)), COUNTS],
            "inf or nan",
        ),
        (
            {"general.type": "imatrix"},
            [("a.in_sum2", GGMLType.F16, (1, 4), MEANS.astype(np.float16)), COUNTS],
            "not F32",
        ),
    ],
)
def test_what_is_no_matrix_is_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: list[Any], sentence: str
) -> None:
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    with pytest.raises(ModelFileError, match=sentence):
        load_importance(tmp_path / "x.gguf")


def test_the_older_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(b"\x10\0\0\0" * 16)
    with pytest.raises(ModelFileError, match="does not begin with GGUF"):
        load_importance(tmp_path / "imatrix.dat")
