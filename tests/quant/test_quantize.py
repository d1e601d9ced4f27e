"""Whole files as other types: bytes beside ggml's own, metadata, and everything that can go wrong."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.errors import ConfigError, DiskFull, ModelFileError, TensorError
from lichen.quant import ggml
from lichen.quant import quantize as module
from lichen.quant.choice import fitting, plan_for, type_named
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFFile, open_gguf
from lichen.quant.importance import Importance
from lichen.quant.quantize import QuantizeProgress, header_bytes, planned_bytes, quantize_file
from tests.models.tiny_models import write_tiny


@pytest.fixture
def source(tmp_path: Path) -> Iterator[GGUFFile]:
    """Two layers, rows of 64 and 128."""
    with open_gguf(write_tiny(tmp_path / "source.gguf", "llama")) as file:
        yield file


def quantize(file: GGUFFile, target: Path, kind: GGMLType, **options: Any) -> GGUFFile:
    quantize_file(file, target, plan_for(file.tensors.values(), kind).types, **options)
    return open_gguf(target)


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.F16, GGMLType.BF16])
def test_matrices_are_what_ggml_makes_of_them_and_vectors_stay(
    source: GGUFFile, tmp_path: Path, kind: GGMLType
) -> None:
    made = quantize(source, tmp_path / "made.gguf", kind)
    assert list(made.tensors) == list(source.tensors)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 1:
            assert made.tensors[name].type is GGMLType.F32
            assert np.array_equal(made.tensors[name].data, tensor.data)
            continue
        expected = np.empty((tensor.shape[0], ggml.row_bytes(kind, tensor.shape[1])), np.uint8)
        ggml.quantize(kind, tensor.data.view(np.float32), expected)
        assert made.tensors[name].type is kind
        assert np.array_equal(made.tensors[name].data, expected), name


def test_metadata_is_kept_and_says_what_changed(source: GGUFFile, tmp_path: Path) -> None:
    made = quantize(
        source, tmp_path / "made.gguf", GGMLType.Q5_0, lineage={"lichen.source.sha256": "ab" * 32}
    )
    changed = {"general.file_type", "general.quantization_version", "lichen.source.sha256"}
    assert set(made.metadata) - set(source.metadata) == changed
    assert made.metadata["general.file_type"].content == 8
    assert made.metadata["general.quantization_version"].content == 2
    assert made.metadata["lichen.source.sha256"].content == "ab" * 32
    for key, value in source.metadata.items():
        assert np.array_equal(np.asarray(made.metadata[key].content), np.asarray(value.content)), key


def test_a_quantized_source_goes_through_its_numbers(source: GGUFFile, tmp_path: Path) -> None:
    first = quantize(source, tmp_path / "q8.gguf", GGMLType.Q8_0)
    second = quantize(first, tmp_path / "q4.gguf", GGMLType.Q4_0)
    name = "blk.1.ffn_down.weight"
    numbers = module.read_rows(first.tensors[name], first.tensors[name].data)
    expected = np.empty_like(second.tensors[name].data)
    ggml.quantize(GGMLType.Q4_0, numbers, expected)
    assert np.array_equal(second.tensors[name].data, expected)


def test_pieces_change_no_bit(source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importance = Importance(
        {
            name: np.linspace(1, 9, one.shape[-1], dtype=np.float32)[None]
            for name, one in source.tensors.items()
        },
        tokens=1,
        chunk=1,
    )
    quantize(source, tmp_path / "whole.gguf", GGMLType.Q4_1, importance=importance)
    monkeypatch.setattr(module, "PIECE", 192)  # three rows of 64, one of 128
    quantize(source, tmp_path / "pieces.gguf", GGMLType.Q4_1, importance=importance)
    quantize(source, tmp_path / "plain.gguf", GGMLType.Q4_1)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
    assert (tmp_path / "whole.gguf").read_bytes() != (tmp_path / "plain.gguf").read_bytes()


def test_rows_that_are_no_whole_blocks_get_a_type_with_as_many_bits(source: GGUFFile) -> None:
    plan = plan_for(source.tensors.values(), GGMLType.Q4_K)
    assert plan.types["blk.0.ffn_down.weight"] is GGMLType.IQ4_NL
    assert plan.stand_ins["blk.0.ffn_down.weight"] is GGMLType.Q4_K
    assert "blk.0.attn_norm.weight" not in plan.stand_ins
    tensor = source.tensors["blk.0.attn_q.weight"]
    assert fitting(tensor, GGMLType.Q5_K) is GGMLType.Q5_0
    assert fitting(tensor, GGMLType.Q6_K) is GGMLType.Q8_0
    assert fitting(tensor, GGMLType.Q8_0) is GGMLType.Q8_0


def test_the_size_is_known_before(source: GGUFFile, tmp_path: Path) -> None:
    types = plan_for(source.tensors.values(), GGMLType.Q5_0).types
    quantize_file(source, tmp_path / "made.gguf", types)
    expected = planned_bytes(source, types) + header_bytes(source)
    assert abs((tmp_path / "made.gguf").stat().st_size - expected) < module.HEADER_ROOM


def test_progress_ends_with_everything(source: GGUFFile, tmp_path: Path) -> None:
    seen: list[QuantizeProgress] = []
    quantize(source, tmp_path / "made.gguf", GGMLType.Q8_0, progress=seen.append)
    assert (seen[-1].bytes_done, seen[-1].tensors_done) == (seen[-1].bytes, len(source.tensors))
    assert [one.bytes_done for one in seen] == sorted(one.bytes_done for one in seen)


# ---- what can go wrong ----------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "source.gguf")


class Stop(BaseException):
    """Stands for Ctrl-C."""


def test_an_interruption_leaves_nothing(source: GGUFFile, tmp_path: Path) -> None:
    def stop(now: QuantizeProgress) -> None:
        if now.tensors_done == 5:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "made.gguf", GGMLType.Q8_0, progress=stop)
    assert left_behind(tmp_path) == []


def test_an_interruption_keeps_the_file_that_was_there(source: GGUFFile, tmp_path: Path) -> None:
    (tmp_path / "made.gguf").write_bytes(b"older")

    def stop(now: QuantizeProgress) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "made.gguf", GGMLType.Q8_0, progress=stop)
    assert left_behind(tmp_path) == ["made.gguf"]
    assert (tmp_path / "made.gguf").read_bytes() == b"older"


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull) as caught:
        quantize(source, tmp_path / "made.gguf", GGMLType.Q8_0)
    assert caught.value.free == 1000 and caught.value.needed > 100_000
    assert left_behind(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(source: GGUFFile, tmp_path: Path) -> None:
    def fill(now: QuantizeProgress) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull):
        quantize(source, tmp_path / "made.gguf", GGMLType.Q8_0, progress=fill)
    assert left_behind(tmp_path) == []


def test_the_source_is_never_the_target(source: GGUFFile, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "source.gguf")
    for name in ("source.gguf", "link.gguf"):
        with pytest.raises(ConfigError, match="is the source itself"):
            quantize(source, tmp_path / name, GGMLType.Q8_0)
    with pytest.raises(ConfigError, match="There is no folder"):
        quantize(source, tmp_path / "nowhere" / "made.gguf", GGMLType.Q8_0)


def test_numbers_that_are_none_name_the_tensor(tmp_path: Path) -> None:
    broken = np.ones((64, 128), np.float32)
    broken[7, 3] = np.nan
    path = write_tiny(tmp_path / "good.gguf", "llama")
    with open_gguf(path) as file:
        position = file.tensors["blk.1.ffn_down.weight"].data.ctypes.data
        start = position - np.frombuffer(next(iter(file.tensors.values())).data, np.uint8).ctypes.data
        first = path.read_bytes().index(next(iter(file.tensors.values())).data.tobytes())
    data = bytearray(path.read_bytes())
    data[first + start : first + start + broken.nbytes] = broken.tobytes()
    (tmp_path / "source.gguf").write_bytes(data)
    path.unlink()
    with (
        open_gguf(tmp_path / "source.gguf") as file,
        pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down\.weight cannot be written as Q8_0: Row 7"),
    ):
        quantize(file, tmp_path / "made.gguf", GGMLType.Q8_0)
    assert left_behind(tmp_path) == []


def test_numbers_too_large_for_a_type_name_the_tensor(tmp_path: Path) -> None:
    large = np.full((64, 128), 1e30, np.float32)
    path = write_tiny(tmp_path / "source.gguf", "llama", tensors={"blk.0.ffn_down.weight": large})
    with open_gguf(path) as file, pytest.raises(TensorError, match=r"blk\.0\.ffn_down\.weight cannot"):
        quantize(file, tmp_path / "made.gguf", GGMLType.Q4_0)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("name", ["q4_k", " Q4_K ", "iq4_xs"])
def test_types_have_names(name: str) -> None:
    assert type_named(name).name == name.strip().upper()


@pytest.mark.parametrize("name", ["", "q4", "Q8_1", "I32", "Q4_K_M", "../x"])
def test_other_names_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="There are: F32, F16"):
        type_named(name)
