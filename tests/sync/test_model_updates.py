"""What the default model and its next version cost: bounds that an update has to keep."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lichen.quant.gguf_check import tensor_places
from lichen.sync.chunks import Recipe, fetch, publish_file
from lichen.sync.recipe import encode
from lichen.sync.store import Store
from tests.sync.faulty_mirror import FaultyMirror

SHARE = 0.03  # of the tensors get wholly new bytes; real training changes less, and then differences help


@pytest.fixture(scope="module")
def versions(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Recipe]:
    """A mirror with the default model and a version of it, and their recipes."""
    folder = tmp_path_factory.mktemp("versions")
    places = tensor_places(model_path)
    chance = random.Random(0)
    data = bytearray(model_path.read_bytes())
    layers = [place for place in places if place.name.startswith("blk.")]
    for place in chance.sample(layers, round(SHARE * len(places))):
        data[place.offset : place.offset + place.size] = chance.randbytes(place.size)
    changed = folder / "changed.gguf"
    changed.write_bytes(data)
    mirror = folder / "mirror"
    first = publish_file(model_path, mirror, whole=False)
    return mirror, first, publish_file(changed, mirror, previous=model_path, whole=False)


async def test_new_changed_and_unchanged(versions: tuple[Path, Recipe, Recipe], tmp_path: Path) -> None:
    folder, first, second = versions
    store, mirror = Store(tmp_path / "store"), FaultyMirror(folder)
    await fetch(first, [mirror], store)
    assert mirror.sent + len(encode(first)) <= 1.05 * first.size
    mirror.sent = 0
    await fetch(second, [mirror], store)
    assert 0 < mirror.sent + len(encode(second)) <= 0.1 * second.size
    mirror.sent = 0
    await fetch(second, [mirror], store)
    assert mirror.sent == 0
