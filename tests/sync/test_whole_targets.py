"""A target without a recipe: it goes on where it was cut off, and wrong bytes cost one more download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lichen.errors import HashMismatch, SourceError
from lichen.sync.manifest import make_manifest
from lichen.sync.trust.device import FleetTarget, _download
from lichen.sync.trust.fetching import FolderFetcher, HttpFetcher
from tests.sync.hostile_repository import manifest
from tests.sync.model_server import ModelServer

DATA = bytes(range(256)) * 4096  # a megabyte
SHA256 = hashlib.sha256(DATA).hexdigest()
TARGET = FleetTarget(make_manifest(manifest("models/it", 1), running="0.1.0"), SHA256, len(DATA), "it")


@pytest.fixture
def server() -> Iterator[ModelServer]:
    server = ModelServer()
    server.files = {"/fleet/targets/it": DATA}
    yield server
    server.close()


async def bring(server: ModelServer, place: Path) -> bytes:
    """One try over HTTP."""
    async with httpx.AsyncClient() as client:
        await _download(HttpFetcher(client, f"{server.url}/fleet"), TARGET, place, None)
    return place.read_bytes()


async def test_it_goes_on_behind_what_came(server: ModelServer, tmp_path: Path) -> None:
    server.cut_after = 600_000
    with pytest.raises((SourceError, HashMismatch)):
        await bring(server, tmp_path / "it")
    came = (tmp_path / "it.part").stat().st_size
    assert 0 < came <= 600_000
    assert await bring(server, tmp_path / "it") == DATA
    assert server.ranges == [f"bytes={came}-"]
    assert not (tmp_path / "it.part").exists()


async def test_a_folder_goes_on_too(tmp_path: Path) -> None:
    (tmp_path / "fleet" / "targets").mkdir(parents=True)
    (tmp_path / "fleet" / "targets" / "it").write_bytes(DATA)
    (tmp_path / "it.part").write_bytes(DATA[:1000])
    await _download(FolderFetcher(tmp_path / "fleet"), TARGET, tmp_path / "it", None)
    assert (tmp_path / "it").read_bytes() == DATA


async def test_a_mirror_that_knows_no_ranges_begins_again(server: ModelServer, tmp_path: Path) -> None:
    server.answers["/fleet/targets/it"] = lambda _: (200, {}, DATA)
    (tmp_path / "it.part").write_bytes(DATA[:1000])
    assert await bring(server, tmp_path / "it") == DATA


async def test_a_false_beginning_is_thrown_away_once(server: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "it.part").write_bytes(b"x" * 1000)
    assert await bring(server, tmp_path / "it") == DATA
    assert len(server.requests) == 2
    server.files = {"/fleet/targets/it": b"y" * len(DATA)}
    with pytest.raises(HashMismatch, match="not the 1,048,576 bytes"):
        await bring(server, tmp_path / "other")
    assert not (tmp_path / "other.part").exists()
