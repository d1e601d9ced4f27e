"""Layouts made from a real model: found again, measured, and nothing left behind when it fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from lichen.errors import EngineError
from lichen.quant.cut import types_of, write_cut
from lichen.quant.gguf import open_gguf
from lichen.quant.gguf_check import check_gguf
from lichen.runtime.layouts import (
    EXPECTED_KL,
    LayoutProgress,
    divergence,
    find,
    make,
    worth_measuring,
)
from lichen.sync.download import hash_file
from lichen.sync.store import Store


def test_layouts_that_keep_the_quality_are_worth_measuring(model_path: Path) -> None:
    summary = check_gguf(model_path)
    assert worth_measuring(summary) == ["source", "q8_0", "f16"]
    only = msgspec.structs.replace(summary, matrix_bytes={"F16": 100, "Q8_0": 10})
    assert worth_measuring(only) == ["source", "q8_0"]


@pytest.fixture(scope="module")
def short_model(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with two of its layers: as a layout is made, and much quicker."""
    target = tmp_path_factory.mktemp("short") / "short.gguf"
    with open_gguf(model_path) as file:
        write_cut(file, target, types_of(file, None), 2)
    return target


@pytest.mark.slow
async def test_layouts_of_the_default_model_keep_its_predictions(model_path: Path, tmp_path: Path) -> None:
    digest = hash_file(model_path)
    for layout in EXPECTED_KL:
        record = await make(model_path, digest, layout, tmp_path)
        assert record.kl <= 0.01, (layout, record)


async def test_a_layout_is_made_once_and_found_again(short_model: Path, tmp_path: Path) -> None:
    model_path = short_model
    digest, told = hash_file(model_path), list[LayoutProgress]()
    assert find(tmp_path, digest, "q8_0") is None
    record = await make(model_path, digest, "q8_0", tmp_path, progress=told.append)
    assert {now.stage for now in told} >= {"measuring"}
    assert 0 <= record.kl < 0.1
    assert record.positions == 4 * 63
    assert divergence(tmp_path, digest)["q8_0"] == record.kl
    found = find(tmp_path, digest, "q8_0")
    assert found is not None
    manifest, path = found
    assert manifest.sha256 == record.sha256 == hash_file(path)
    with open_gguf(path) as file:
        assert file.metadata["lichen.source.sha256"].content == digest
    [listed] = Store(tmp_path / "store").manifests()
    assert listed.source == f"layout:q8_0:{digest}"
    assert listed.name.endswith("-q8_0")

    before = path.stat().st_mtime_ns
    (tmp_path / "layouts" / f"{digest[:16]}-q8_0.json").unlink()
    again = await make(model_path, digest, "q8_0", tmp_path)
    assert (again.kl, again.sha256) == (record.kl, record.sha256), "the record is made again, alike"
    assert path.stat().st_mtime_ns == before
    Store(tmp_path / "store").remove(listed.name)
    assert find(tmp_path, digest, "q8_0") is None


async def test_a_layout_that_cannot_be_made_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match="could not be made"):
        await make(broken, "0" * 64, "q8_0", tmp_path)
    assert not list((tmp_path / "scratch").glob("*"))
    assert Store(tmp_path / "store").manifests() == []


async def test_cancelling_ends_the_process(short_model: Path, tmp_path: Path) -> None:
    model_path = short_model
    digest = hash_file(model_path)
    started = asyncio.Event()
    task = asyncio.create_task(make(model_path, digest, "f16", tmp_path, progress=lambda now: started.set()))
    await asyncio.wait_for(started.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert find(tmp_path, digest, "f16") is None


def test_what_is_expected_is_within_what_counts() -> None:
    assert all(kl <= 0.01 for kl in EXPECTED_KL.values())
