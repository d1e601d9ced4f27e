"""Mirrors over HTTP and in folders: limits, slowness, names that lead elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lichen.errors import FleetError, NotFound, SourceError
from lichen.sync.trust.fetching import FolderFetcher, HttpFetcher, check_mirror, fetcher_for, read
from tests.sync.model_server import ModelServer


@pytest.fixture
def server() -> Iterator[ModelServer]:
    server = ModelServer()
    server.files = {"/fleet/metadata/timestamp.json": b"t" * 200_000}
    yield server
    server.close()


async def test_http_gives_bytes_up_to_the_limit(server: ModelServer) -> None:
    async with httpx.AsyncClient() as client:
        mirror = fetcher_for(f"{server.url}/fleet/", client)
        assert await read(mirror, "metadata/timestamp.json", 200_000) == b"t" * 200_000
        assert server.requests[-1][1]["Accept-Encoding"] == "identity"
        with pytest.raises(SourceError, match="more than the 199,999 bytes"):
            await read(mirror, "metadata/timestamp.json", 199_999)
        with pytest.raises(NotFound):
            await read(mirror, "metadata/2.root.json", 10)


async def test_http_that_redirects_fails_or_is_not_there_is_a_sentence(server: ModelServer) -> None:
    server.redirects["/fleet/away"] = "/fleet/metadata/timestamp.json"
    server.answers["/fleet/broken"] = lambda _: (500, {}, b"")
    async with httpx.AsyncClient() as client:
        mirror = HttpFetcher(client, f"{server.url}/fleet")
        for name, status in (("away", "302"), ("broken", "500")):
            with pytest.raises(SourceError, match=f"answered {status}"):
                await read(mirror, name, 10)
        with pytest.raises(SourceError, match="cannot be reached"):
            await read(HttpFetcher(client, "http://127.0.0.1:1/user"), "x", 10)
    assert HttpFetcher(client, "https://name:secret@m.example:8443/x").address == "https://m.example:8443/x"


async def test_slow_retrieval_is_cut(server: ModelServer) -> None:
    """A mirror that drips stays below the least rate, and one that says nothing is not waited for."""
    server.pause = 0.4
    silent = threading.Event()
    server.answers["/fleet/silent"] = lambda _: (200 + 0 * silent.wait(5), {}, b"")
    async with httpx.AsyncClient() as client:
        mirror = HttpFetcher(client, f"{server.url}/fleet", patience=0.3, slowest=10_000_000)
        for name in ("metadata/timestamp.json", "silent"):
            begun = time.monotonic()
            with pytest.raises(SourceError, match="too slowly"):
                await read(mirror, name, 1 << 20)
            assert time.monotonic() - begun < 2
        patient = HttpFetcher(client, f"{server.url}/fleet", patience=0.3, slowest=10_000)
        assert len(await read(patient, "metadata/timestamp.json", 1 << 20)) == 200_000, (
            "slow, but fast enough"
        )
    silent.set()


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "",
        "a//b",
        ".hidden",
        "a\x00b",
        "a?b",
        "a\\b",
        "x" * 2000,
    ],
)
async def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "mirror").mkdir()
    for mirror in (FolderFetcher(tmp_path / "mirror"), HttpFetcher(httpx.AsyncClient(), "http://m.example")):
        with pytest.raises(SourceError, match="is no name of a file"):
            await read(mirror, name, 10)


async def test_a_folder_is_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "1.a%2Fb.json").write_bytes(b"12345")
    mirror = fetcher_for(tmp_path.as_uri(), httpx.AsyncClient())
    assert await read(mirror, "metadata/1.a%2Fb.json", 5) == b"12345"
    with pytest.raises(SourceError, match="more than the 4 bytes"):
        await read(mirror, "metadata/1.a%2Fb.json", 4)
    with pytest.raises(NotFound):
        await read(mirror, "metadata/none", 4)
    with pytest.raises(SourceError, match="cannot be read"):
        await read(mirror, "metadata", 4)


@pytest.mark.parametrize(
    "url", ["", "ftp://x/y", "http://", "m.example", "http://x:99999999/", "https://x/?q=1", "http://[::"]
)
def test_what_cannot_be_a_mirror_is_refused(url: str) -> None:
    with pytest.raises(FleetError, match="cannot be a mirror"):
        check_mirror(url)
