"""Where files are cut: at tensors, without gaps, and the same again after an edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lichen.errors import StoreError
from lichen.quant.gguf_check import tensor_places
from lichen.sync.chunking import TENSOR_CHUNK, Cut, cut
from tests.sync.weights import gguf_of, weights


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def contents(path: Path) -> set[bytes]:
    data = path.read_bytes()
    return {data[each.offset : each.offset + each.length] for each in cut(path)}


def check_whole(cuts: list[Cut], size: int) -> None:
    at = 0
    for each in cuts:
        assert each.offset == at
        assert each.length > 0
        at += each.length
    assert at == size


def test_the_real_model_is_cut_at_its_tensors(model_path: Path) -> None:
    cuts = cut(model_path)
    check_whole(cuts, model_path.stat().st_size)
    starts = {each.offset for each in cuts}
    tensors = tensor_places(model_path)
    assert len(tensors) > 100
    assert {tensor.offset for tensor in tensors} <= starts
    assert all(each.length <= TENSOR_CHUNK and each.length % each.block == 0 for each in cuts if each.label)


def test_a_longer_template_changes_only_the_header(tmp_path: Path) -> None:
    tensors = weights()
    before = contents(write(tmp_path / "before", gguf_of(tensors)))
    after = contents(write(tmp_path / "after", gguf_of(tensors, template="{{ messages }}, please" * 20)))
    new = after - before
    assert len(new) <= 2
    assert sum(map(len, new)) < 3000


def test_other_files_are_cut_by_content(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(8 << 20)
    before = contents(write(tmp_path / "before", data))
    edited = data[: 3 << 20] + b"a few bytes more" + data[3 << 20 :]
    path = write(tmp_path / "after", edited)
    check_whole(cut(path), len(edited))
    assert sum(map(len, contents(path) - before)) < 1 << 19


@pytest.mark.parametrize("data", [b"", b"x", b"GGUF", b"GGUF" + bytes(100), gguf_of(weights(layers=1))[:-1]])
def test_odd_and_broken_files(tmp_path: Path, data: bytes) -> None:
    check_whole(cut(write(tmp_path / "odd", data)), len(data))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        cut(tmp_path / "missing")
