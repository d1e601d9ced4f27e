"""Fetching by chunks through its front door: real files, real servers, and mirrors that fail in every way."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import msgspec
import pytest

from lichen.errors import ConfigError, HashMismatch, LichenError, OfflineError, SourceError
from lichen.sync.chunks import FetchProgress, RateLimit, Recipe, fetch, find_recipe, open_mirror, publish_file
from lichen.sync.recipe import Chunk, encode
from lichen.sync.store import Store
from tests.sync.faulty_mirror import FAULTS, FaultyMirror
from tests.sync.range_server import RangeServer
from tests.sync.weights import gguf_of, nudged, weights

TENSORS = weights()
CHANGED = "blk.2.ffn_up.weight"
PATIENCE = 0.3  # seconds; a mirror that stalls must not cost a test more


class Published:
    """A mirror's folder with two versions: one tensor of the second is trained a little."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "mirror"
        self.old, self.new = folder / "old.gguf", folder / "new.gguf"
        self.old.write_bytes(gguf_of(TENSORS))
        self.new.write_bytes(gguf_of({**TENSORS, CHANGED: nudged(TENSORS[CHANGED], 1e-3)}))
        self.first = publish_file(self.old, self.folder)
        self.second = publish_file(self.new, self.folder, previous=self.old)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def server(published: Published) -> Iterator[RangeServer]:
    server = RangeServer(published.folder)
    yield server
    server.close()


def check(blob: Path, recipe: Recipe) -> None:
    assert blob.name == recipe.sha256 == hashlib.sha256(blob.read_bytes()).hexdigest()
    assert not blob.stat().st_mode & 0o222


def leftovers(store: Store) -> list[Path]:
    return list(store.root.glob("partial/*")) + list(store.root.glob("blobs/sha256/*"))


def packs_read(mirror: FaultyMirror) -> list[tuple[str, int, int]]:
    return [read for read in mirror.reads if read[0].startswith("packs/")]


async def test_over_http_with_progress(published: Published, store: Store, server: RangeServer) -> None:
    mirror = open_mirror(server.url + "/")
    seen: list[FetchProgress] = []
    recipe = await find_recipe(published.first.sha256, [mirror])
    assert recipe == published.first
    check(await fetch(recipe, [mirror], store, progress=seen.append), recipe)
    await mirror.close()
    assert [now.phase for now in seen][:1] == ["planning"]
    assert list(dict.fromkeys(now.phase for now in seen)) == ["planning", "fetching", "hashing", "done"]
    assert seen[-1].done == seen[-1].total == recipe.size
    assert max(now.done for now in seen if now.phase == "fetching") == recipe.size
    assert recipe.packs[0].size * 0.99 < seen[-1].fetched <= recipe.packs[0].size
    assert max(now.rate for now in seen) > 0
    ranges = [wanted for path, wanted in server.requests if path.startswith("/packs/")]
    assert len(ranges) <= 3  # of 14 chunks in 3.4 MB


async def test_through_fsspec(published: Published, store: Store) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(published.folder), "/bucket", recursive=True)
    mirrors = [open_mirror("memory://bucket"), open_mirror(f"file://{published.folder}")]
    for recipe, mirror in zip((published.first, published.second), mirrors, strict=True):
        assert await find_recipe(recipe.sha256, [mirror]) == recipe
        check(await fetch(recipe, [mirror], store), recipe)
    memory.rm("/bucket", recursive=True)


async def test_an_update_costs_what_changed_and_nothing_is_kept_twice(
    published: Published, store: Store
) -> None:
    mirror = FaultyMirror(published.folder)
    await fetch(published.first, [mirror], store)
    mirror.sent = 0
    check(await fetch(published.second, [mirror], store), published.second)
    assert mirror.sent < 0.5 * len(TENSORS[CHANGED])  # the difference, not the tensor
    files = {path.parent.name for path in store.root.rglob("*") if path.is_file()}
    assert files <= {"sha256", "recipes", "locks"}
    mirror.sent = 0
    check(await fetch(published.second, [mirror], store), published.second)
    assert mirror.sent == 0


async def test_chunks_of_a_file_that_came_another_way(published: Published, store: Store) -> None:
    blob = store.blob(published.first.sha256)
    blob.parent.mkdir(parents=True)
    shutil.copy(published.old, blob)
    mirror = FaultyMirror(published.folder)
    check(await fetch(published.second, [mirror], store), published.second)
    assert mirror.sent < 0.5 * len(TENSORS[CHANGED])


async def test_a_damaged_note_or_blob_gives_no_wrong_bytes(published: Published, store: Store) -> None:
    await fetch(published.first, [FaultyMirror(published.folder)], store)
    (store.root / "recipes" / published.first.sha256).write_bytes(b"rubbish")
    blob = store.blob(published.first.sha256)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    at = data.index(TENSORS[CHANGED][:64])  # in the base of the difference, and in chunks to copy
    data[at] ^= 1
    data[-1] ^= 1
    blob.write_bytes(data)
    check(await fetch(published.second, [FaultyMirror(published.folder)], store), published.second)


async def test_a_base_that_rots_after_it_was_noted(published: Published, store: Store) -> None:
    await fetch(published.first, [FaultyMirror(published.folder)], store)
    blob = store.blob(published.first.sha256)
    blob.chmod(0o644)
    blob.write_bytes(bytes(published.first.size))
    check(await fetch(published.second, [FaultyMirror(published.folder)], store), published.second)


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_fault_costs_one_detour(published: Published, store: Store, fault: str) -> None:
    mirror = FaultyMirror(published.folder, [fault])
    began = time.monotonic()
    check(await fetch(published.first, [mirror], store, patience=PATIENCE), published.first)
    assert time.monotonic() - began < 10 * PATIENCE
    assert not any(path.startswith("files/") for path, _, _ in mirror.reads)


async def test_only_the_bad_chunk_is_fetched_again_and_from_the_other_mirror(
    published: Published, store: Store
) -> None:
    bad = FaultyMirror(published.folder, ["corrupt"], name="bad")
    good = FaultyMirror(published.folder, name="good")
    check(await fetch(published.first, [bad, good], store), published.first)
    assert 0 < good.sent <= max(piece.stored for piece in published.first.pieces)
    assert bad.sent <= published.first.packs[0].size


@pytest.mark.parametrize("seed", range(4))
async def test_mirrors_that_fail_half_of_the_time(published: Published, store: Store, seed: int) -> None:
    mirrors = [FaultyMirror(published.folder, chance=0.5, seed=2 * seed + n) for n in range(2)]
    check(await fetch(published.first, mirrors, store, patience=PATIENCE), published.first)
    check(await fetch(published.second, mirrors, store, patience=PATIENCE), published.second)


async def test_without_packs_the_whole_file_serves(published: Published, store: Store) -> None:
    mirror = FaultyMirror(published.folder, chance=1, only="packs/")
    mirror.files = {path: data for path, data in mirror.files.items() if not path.startswith("packs/")}
    check(await fetch(published.first, [mirror], store, patience=PATIENCE), published.first)
    before = mirror.sent
    check(await fetch(published.second, [mirror], store, patience=PATIENCE), published.second)
    assert mirror.sent - before == len(TENSORS[CHANGED])  # still only the chunks that are not here


async def test_a_recipe_with_false_chunks_costs_a_plain_download(published: Published, store: Store) -> None:
    chunks = list(published.second.chunks)
    last = published.first.chunks[-1]
    place = next(i for i, chunk in enumerate(chunks) if chunk.length == last.length and chunk != last)
    chunks[place] = Chunk(last.sha256, last.length)
    pieces = tuple(piece for piece in published.second.pieces if piece.chunk != place)
    lying = msgspec.structs.replace(published.second, chunks=tuple(chunks), pieces=pieces)
    mirror = FaultyMirror(published.folder)
    check(await fetch(lying, [FaultyMirror(published.folder, chance=1), mirror], store, patience=0.1), lying)
    assert (lying.whole_path, 0, lying.size) in mirror.reads


async def test_a_file_that_no_mirror_has(published: Published, store: Store) -> None:
    nowhere = msgspec.structs.replace(published.first, sha256="0" * 64)
    with pytest.raises(HashMismatch, match="Nothing was kept"):
        await fetch(nowhere, [FaultyMirror(published.folder)], store, patience=0.1)
    assert leftovers(store) == []
    gone = msgspec.structs.replace(published.first, whole=False)
    empty = FaultyMirror(published.folder)
    empty.files.clear()
    with pytest.raises(SourceError, match="has no packs/"):
        await fetch(gone, [empty], store, patience=0.05)
    with pytest.raises(SourceError, match="No mirror has"):
        await fetch(published.first, [], store)
    with pytest.raises(SourceError, match="There is no mirror"):
        await find_recipe(published.first.sha256, [])


async def test_unusable_mirrors_say_why(published: Published, store: Store, server: RangeServer) -> None:
    server.ignore_ranges = True
    mirror = open_mirror(server.url)
    with pytest.raises(SourceError, match="does not give out ranges"):
        await fetch(published.first, [mirror], store, patience=0.05)
    with pytest.raises(SourceError, match="404"):
        await find_recipe("0" * 64, [mirror])
    await mirror.close()
    with pytest.raises(SourceError, match="64 hexadecimal"):
        await find_recipe("../../etc/passwd", [mirror])
    with pytest.raises(SourceError, match="cannot be read"):
        await find_recipe("0" * 64, [open_mirror(f"file://{published.folder}")])
    with pytest.raises(ConfigError, match="cannot be used"):
        open_mirror("nosuchscheme://bucket")


async def test_a_hostile_recipe_is_refused_at_once(published: Published, store: Store) -> None:
    mirror = FaultyMirror(published.folder)
    sha256 = published.first.sha256
    mirror.files[f"recipes/{sha256}"] = encode(msgspec.structs.replace(published.first, size=1 << 50))
    with pytest.raises(SourceError, match="not sound"):
        await find_recipe(sha256, [mirror])
    assert await find_recipe(sha256, [mirror, FaultyMirror(published.folder)]) == published.first
    with pytest.raises(SourceError, match="not sound"):
        await fetch(msgspec.structs.replace(published.first, size=1 << 50), [mirror], store)
    assert packs_read(mirror) == []


async def test_a_cancelled_fetch_goes_on_where_it_stopped(published: Published, store: Store) -> None:
    slow = FaultyMirror(published.folder, ["slow"] * 100)
    task = asyncio.ensure_future(fetch(published.first, [slow], store, connections=2))
    while slow.sent < published.first.packs[0].size // 2:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    mirror = FaultyMirror(published.folder)
    check(await fetch(published.first, [mirror], store), published.first)
    most = max(piece.stored for piece in published.first.pieces)
    assert mirror.sent + slow.sent <= published.first.packs[0].size + 2 * (most + 50_000)


async def test_the_rate_is_kept(published: Published, store: Store) -> None:
    rate = published.first.packs[0].size / 0.6
    began = time.monotonic()
    await fetch(published.first, [FaultyMirror(published.folder)], store, pace=RateLimit(rate))
    assert 0.5 < time.monotonic() - began < 3


async def test_offline_uses_what_is_here(published: Published, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", offline=True)
    mirror = FaultyMirror(published.folder)
    with pytest.raises(OfflineError):
        await fetch(published.first, [mirror], store)
    await fetch(published.first, [mirror], Store(tmp_path / "store"))
    check(await fetch(published.first, [], store), published.first)


async def test_two_at_once_do_the_work_once(published: Published, store: Store) -> None:
    mirror = FaultyMirror(published.folder)
    await asyncio.gather(*(fetch(published.first, [mirror], store) for _ in range(3)))
    assert mirror.sent <= published.first.packs[0].size


async def test_a_full_disk(published: Published, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.sync.download.MARGIN", 1 << 60)
    with pytest.raises(LichenError, match="free"):
        await fetch(published.first, [FaultyMirror(published.folder)], store)
    assert not store.blob(published.first.sha256).exists()
