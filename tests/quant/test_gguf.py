"""GGUF files read and written: the same bytes again, every type of value, split files, and lies."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.errors import DiskFull, ModelFileError, StoreError, TensorError
from lichen.quant.gguf import GGMLType, GGUFFile, Value, ValueType, open_gguf, write_gguf
from lichen.quant.gguf_check import check_gguf
from tests.quant.tiny_gguf import METADATA, WIDTH, tiny_gguf

Item = tuple[str, GGMLType, tuple[int, ...], Any]
EMBEDDING: Item = ("token_embd.weight", GGMLType.F32, (4, WIDTH), np.arange(4 * WIDTH, dtype=np.float32))
NORM: Item = ("output_norm.weight", GGMLType.Q4_0, (WIDTH,), bytes(range(18)))
MODEL: dict[str, Any] = {
    key: content if kind != 9 else list(content[1]) for key, (kind, content) in METADATA.items()
}


def items(file: GGUFFile) -> list[Item]:
    return [(tensor.name, tensor.type, tensor.shape, tensor.data) for tensor in file.tensors.values()]


def same(one: Value, other: Value) -> bool:
    if (one.type, one.item_type) != (other.type, other.item_type):
        return False
    if one.item_type is ValueType.ARRAY:
        return len(one.content) == len(other.content) and all(map(same, one.content, other.content))
    return bool(np.array_equal(one.content, other.content))


# ---- the same again -------------------------------------------------------------------------------


def test_the_default_model_written_again_is_the_same_file(model_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    with open_gguf(model_path) as file:
        assert file.tensors["token_embd.weight"].shape == (49152, 576)
        assert not file.tensors["token_embd.weight"].data.flags.writeable
        write_gguf(copy, file.metadata, items(file))
    assert copy.read_bytes() == model_path.read_bytes()


def test_another_reader_finds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, MODEL, [EMBEDDING, NORM])
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == MODEL["tokenizer.ggml.tokens"]
    assert reader.fields["llama.block_count"].contents() == 1
    first, second = reader.tensors
    assert (first.name, list(first.shape)) == ("token_embd.weight", [WIDTH, 4])
    assert np.array_equal(first.data, EMBEDDING[3].reshape(4, WIDTH))
    assert second.data.tobytes() == NORM[3]
    check_gguf(path)


EVERY_TYPE: dict[str, Value] = {
    **{
        f"a.{kind.name}": Value(kind, 7)
        for kind in ValueType
        if kind.name.startswith(("INT", "UINT", "FLOAT"))
    },
    "a.low": Value(ValueType.INT64, -(1 << 63)),
    "a.high": Value(ValueType.UINT64, (1 << 64) - 1),
    "a.bool": Value(ValueType.BOOL, True),
    "a.text": Value(ValueType.STRING, "grün\0\n"),
    "a.bytes": Value(ValueType.STRING, b"\xff\xfe".decode("utf-8", "surrogateescape")),
    "a.texts": Value(ValueType.ARRAY, ("", "x"), ValueType.STRING),
    "a.nothing": Value(ValueType.ARRAY, (), ValueType.STRING),
    "a.flags": Value(ValueType.ARRAY, np.array([True, False]), ValueType.BOOL),
    "a.halves": Value(ValueType.ARRAY, np.array([0.5, -0.0], np.float32), ValueType.FLOAT32),
    "a.nested": Value.of([[1, 2], [3.5], ["x", "y"]]),
}


def test_every_type_of_value_comes_back(tmp_path: Path) -> None:
    path, again = tmp_path / "values.gguf", tmp_path / "again.gguf"
    write_gguf(path, EVERY_TYPE, [], alignment=64)
    with open_gguf(path, model=False) as file:
        assert [*file.metadata] == [*EVERY_TYPE, "general.alignment"]
        for key, value in EVERY_TYPE.items():
            assert same(file.metadata[key], value), key
        write_gguf(again, file.metadata, [])
    assert again.read_bytes() == path.read_bytes()


def test_plain_values_get_the_types_of_llama_cpp() -> None:
    for content, kind, item in (
        (True, ValueType.BOOL, None),
        (0, ValueType.UINT32, None),
        (-1, ValueType.INT32, None),
        (1 << 40, ValueType.UINT64, None),
        (-(1 << 40), ValueType.INT64, None),
        (0.5, ValueType.FLOAT32, None),
        ("x", ValueType.STRING, None),
        ([1, -1], ValueType.ARRAY, ValueType.INT32),
        ([1, 0.5], ValueType.ARRAY, ValueType.FLOAT32),
        (np.zeros(2, np.int8), ValueType.ARRAY, ValueType.INT8),
        ([["x"]], ValueType.ARRAY, ValueType.ARRAY),
    ):
        value = Value.of(content)
        assert (value.type, value.item_type) == (kind, item)
    for bad in (None, {}, [], [1, "x"], np.zeros((2, 2)), object()):
        with pytest.raises(ModelFileError):
            Value.of(bad)


VALUES = st.one_of(
    st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(width=32, allow_nan=False), st.text(),
    st.lists(st.text(), min_size=1, max_size=5), st.lists(st.integers(-9, 9), min_size=1, max_size=40),
    st.lists(st.lists(st.booleans(), min_size=1), min_size=1, max_size=3),
)  # fmt: skip
TENSORS = st.lists(
    st.tuples(
        st.sampled_from([GGMLType.F32, GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.I8, GGMLType.MXFP4]),
        st.lists(st.integers(1, 3), max_size=3),
        st.integers(1, 3),
    ),
    max_size=5,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(min_size=1, max_size=20), VALUES, max_size=5),
    TENSORS,
    st.sampled_from([None, 8, 4096]),
)
def test_any_file_comes_back(
    tmp_path: Path, metadata: dict[str, Any], tensors: list[Any], alignment: int | None
) -> None:
    from lichen.quant.ggml import block_size, row_bytes

    chance = np.random.default_rng(len(tensors))
    wanted: list[Item] = []
    for number, (kind, outer, blocks) in enumerate(tensors):
        shape = (*outer, blocks * block_size(kind))
        size = int(np.prod(outer, dtype=int)) * row_bytes(kind, shape[-1])
        wanted.append((f"t{number}", kind, shape, chance.integers(0, 256, size, np.uint8)))
    metadata.pop("general.alignment", None)
    path = tmp_path / "any.gguf"
    write_gguf(path, metadata, iter(wanted), alignment=alignment)
    with open_gguf(path, model=False) as file:
        assert all(same(file.metadata[key], Value.of(content)) for key, content in metadata.items())
        assert [item[:3] for item in items(file)] == [item[:3] for item in wanted]
        for found, item in zip(file.tensors.values(), wanted, strict=True):
            assert found.data.tobytes() == item[3].tobytes()
            assert found.data.ctypes.data % (alignment or 32) == 0


# ---- writing --------------------------------------------------------------------------------------


def test_an_iterator_of_tensors_is_never_in_memory_together(tmp_path: Path) -> None:
    def many() -> Iterator[Item]:
        for number in range(40):
            yield f"t{number}", GGMLType.F32, (1 << 18,), np.full(1 << 18, number, np.float32)

    tracemalloc.start()
    try:
        write_gguf(tmp_path / "large.gguf", {}, many())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20  # of 40 MiB
    with open_gguf(tmp_path / "large.gguf", model=False) as file:
        assert file.tensors["t39"].data.view(np.float32)[0, -1] == 39


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, MODEL, [EMBEDDING])
    before = path.read_bytes()

    def broken() -> Iterator[Item]:
        yield EMBEDDING
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_gguf(path, MODEL, broken())
    faults: list[tuple[list[Item], str]] = [
        ([EMBEDDING, EMBEDDING], "two tensors have the same name"),
        ([("x" * 64, GGMLType.F32, (1,), bytes(4))], "64 bytes"),
        ([("x", GGMLType.F32, (1,), bytes(5))], "but 5 were given"),
        ([("x", GGMLType.F32, (1, 1, 1, 1, 1), bytes(4))], "1 to 4 dimensions"),
        ([("x", GGMLType.F32, (0,), b"")], "1 to 4 dimensions"),
        ([("x", GGMLType.F32, (2,), np.zeros((2, 2), np.float32)[:, 0])], "no contiguous buffer"),
    ]
    for tensors, words in faults:
        with pytest.raises(ModelFileError, match=words):
            write_gguf(path, MODEL, tensors)
    with pytest.raises(TensorError, match="blocks of 32"):
        write_gguf(path, MODEL, [("x", GGMLType.Q4_0, (33,), bytes(36))])
    for metadata, words in (
        ({"x": Value(ValueType.UINT8, 256)}, "x cannot be UINT8"),
        ({"x": Value(ValueType.ARRAY, ["a"])}, "no item type"),
        ({"x": Value(ValueType.ARRAY, np.array([0.5]), ValueType.INT8)}, "x cannot be ARRAY"),
        ({"": 1}, "is empty"),
        ({"general.alignment": 12}, "alignment is 12"),
    ):
        with pytest.raises(ModelFileError, match=words):
            write_gguf(path, metadata, [])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_a_full_or_missing_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        write_gguf(tmp_path / "missing" / "model.gguf", MODEL, [EMBEDDING])

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull):
        write_gguf(tmp_path / "model.gguf", MODEL, [EMBEDDING])
    assert list(tmp_path.iterdir()) == []


# ---- reading --------------------------------------------------------------------------------------


def test_views_outlive_the_file_and_a_closed_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, MODEL, [EMBEDDING, NORM])
    with open_gguf(path) as file:
        data = file.tensors["token_embd.weight"].data
        with pytest.raises(ValueError, match="read-only"):
            data[0] = 0
        write_gguf(path, MODEL, [EMBEDDING])  # the file under the open mapping is replaced, not changed
        assert len(file.tensors) == 2
    path.unlink()
    assert np.array_equal(data.view(np.float32).reshape(-1), EMBEDDING[3])
    for name in ("metadata", "tensors"):
        with pytest.raises(ModelFileError, match="is closed already"):
            getattr(file, name)


def test_what_is_no_model_is_read_only_when_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    write_gguf(path, {"general.type": "adapter"}, [NORM])
    with pytest.raises(ModelFileError, match=r"general\.architecture"):
        open_gguf(path)
    with open_gguf(path, model=False) as file:
        assert file.tensors["output_norm.weight"].data.tobytes() == NORM[3]


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    def array(*depths: int) -> bytes:
        return b"".join(struct.pack("<IQ", 9, 1) for _ in depths) + struct.pack("<IQ", 4, 0)

    def with_value(kind: int, value: bytes) -> bytes:
        return (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"x"
            + struct.pack("<I", kind)
            + value
        )

    faults = {
        "cut off": tiny_gguf(data_bytes=100),
        "unknown type 77": tiny_gguf(tensors=[("token_embd.weight", [WIDTH, 4], 77, 0)]),
        "no multiple of Q4_0's 32": tiny_gguf(tensors=[("token_embd.weight", [33, 4], 2, 0)]),
        "nested more than 4 deep": with_value(9, array(*range(5))),
        "more than the file can hold": with_value(9, struct.pack("<IQ", 9, 1 << 40)),
        "unknown item type 13": with_value(9, struct.pack("<IQ", 13, 1)),
        "only 0 bytes": b"",
    }
    for words, content in faults.items():
        path = tmp_path / "hostile.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=words):
            open_gguf(path, model=False)
    path.write_bytes(with_value(9, struct.pack("<IQ", 7, 20) + bytes([0, 1] * 9 + [2, 0])))
    with open_gguf(path, model=False) as file, pytest.raises(ModelFileError, match="other than 0 and 1"):
        file.metadata["x"]
    path.write_bytes(with_value(9, array(0)))
    with pytest.raises(ModelFileError, match="unsupported type 9"):
        check_gguf(path)  # llama.cpp knows no nested arrays
    with pytest.raises(ModelFileError, match="is not a file"):
        open_gguf(tmp_path)
