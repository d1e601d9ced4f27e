"""Publishing: what lies on the mirror, and what a second version adds to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lichen.errors import StoreError
from lichen.sync.publish import publish_file
from lichen.sync.recipe import Recipe, decode
from tests.sync.weights import gguf_of, nudged, weights

TENSORS = weights()


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def version(tmp_path: Path, name: str, tensors: dict[str, bytes]) -> Path:
    path = tmp_path / name
    path.write_bytes(gguf_of(tensors))
    return path


def stored_bytes(mirror: Path) -> int:
    return sum(path.stat().st_size for path in (mirror / "packs").iterdir())


def check_names(mirror: Path) -> None:
    for path in (*(mirror / "packs").iterdir(), *(mirror / "files").iterdir()):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    for path in (mirror / "recipes").iterdir():
        recipe = decode(path.read_bytes(), path.name)
        assert all((mirror / pack.path).stat().st_size == pack.size for pack in recipe.packs)


def test_everything_is_named_by_its_hash_and_nothing_else_is_there(tmp_path: Path, mirror: Path) -> None:
    path = version(tmp_path, "one", TENSORS)
    recipe = publish_file(path, mirror)
    assert recipe.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    check_names(mirror)
    assert {entry.name for entry in mirror.iterdir()} == {"recipes", "packs", "files"}
    assert (mirror / recipe.whole_path).stat().st_ino == path.stat().st_ino
    assert stored_bytes(mirror) < recipe.size


def test_publishing_twice_changes_nothing(tmp_path: Path, mirror: Path) -> None:
    path = version(tmp_path, "one", TENSORS)
    first = publish_file(path, mirror)
    before = sorted(mirror.rglob("*"))
    assert publish_file(path, mirror) == first
    assert sorted(mirror.rglob("*")) == before


def test_a_second_version_adds_only_what_changed(tmp_path: Path, mirror: Path) -> None:
    name = "blk.2.ffn_up.weight"
    publish_file(version(tmp_path, "one", TENSORS), mirror)
    before = stored_bytes(mirror)
    changed = {**TENSORS, name: weights(seed=9, layers=0)["token_embd.weight"]}
    recipe = publish_file(version(tmp_path, "two", changed), mirror)
    assert stored_bytes(mirror) - before < 1.01 * len(TENSORS[name])
    assert len(recipe.packs) == 2
    check_names(mirror)


def deltas(recipe: Recipe) -> int:
    return sum(piece.base is not None for piece in recipe.pieces)


def test_a_difference_is_kept_beside_the_chunk_where_it_is_smaller(tmp_path: Path, mirror: Path) -> None:
    old = version(tmp_path, "one", TENSORS)
    publish_file(old, mirror)
    near = {**TENSORS, "blk.1.ffn_up.weight": nudged(TENSORS["blk.1.ffn_up.weight"], 1e-3)}
    far = {**TENSORS, "blk.1.ffn_up.weight": weights(seed=9, layers=0)["token_embd.weight"]}
    near_recipe = publish_file(version(tmp_path, "near", near), mirror, previous=old)
    assert deltas(near_recipe) == 2  # 512 KiB are two chunks
    assert deltas(publish_file(version(tmp_path, "far", far), mirror, previous=old)) == 0
    alone = {piece.chunk for piece in near_recipe.pieces if piece.base is None}
    assert len(alone) == len({chunk.sha256 for chunk in near_recipe.chunks})  # none needs a base
    assert deltas(publish_file(tmp_path / "near", mirror)) == 2  # they are found again without the old file
    check_names(mirror)


def test_an_equal_tensor_is_stored_once(tmp_path: Path, mirror: Path) -> None:
    twins = {**TENSORS, "blk.1.ffn_up.weight": TENSORS["blk.0.ffn_up.weight"]}
    recipe = publish_file(version(tmp_path, "one", twins), mirror)
    assert len(recipe.pieces) == len(recipe.chunks) - 2


def test_files_that_are_no_models(tmp_path: Path, mirror: Path) -> None:
    for data in (b"", b"x", b"GGUF" + bytes(1 << 20)):
        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        recipe = publish_file(path, mirror, whole=False)
        assert recipe.size == len(data)
        assert not recipe.whole
    with pytest.raises(StoreError):
        publish_file(tmp_path / "missing", mirror)
    assert not list((mirror / "packs").glob("new-*"))
    check_names(mirror)


def test_what_is_no_recipe_on_the_mirror_is_left_alone(tmp_path: Path, mirror: Path) -> None:
    path = version(tmp_path, "one", TENSORS)
    (mirror / "recipes").mkdir(parents=True)
    (mirror / "recipes" / ("0" * 64)).write_bytes(b"something else")
    recipe = publish_file(path, mirror)
    (mirror / recipe.packs[0].path).unlink()  # a pack that is gone is written again
    assert publish_file(path, mirror) == recipe
    assert (mirror / recipe.packs[0].path).is_file()
