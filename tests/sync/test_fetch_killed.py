"""A pull that is killed, again and again: it goes on and loses at most what was in flight."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lichen.sync.fetch import CONNECTIONS
from lichen.sync.mirrors import BLOCK
from lichen.sync.publish import publish_file
from lichen.sync.recipe import Recipe
from lichen.sync.store import Store
from tests.sync.range_server import RangeServer
from tests.sync.weights import gguf_of, weights

SCRIPT = Path(__file__).with_name("pull_process.py")
SOON = 0.25  # seconds after the first byte within which the kill comes


def held(partial: Path, recipe: Recipe) -> int:
    """Stored bytes of the chunks that a partial file has."""
    if not partial.is_file():
        return 0
    data, at, there = partial.read_bytes(), 0, set()
    for chunk in recipe.chunks:
        if hashlib.sha256(data[at : at + chunk.length]).digest() == chunk.sha256:
            there.add(chunk.sha256)
        at += chunk.length
    return sum(piece.stored for piece in recipe.pieces if recipe.chunks[piece.chunk].sha256 in there)


def delivered(counter: Path) -> int:
    data = counter.read_bytes() if counter.is_file() else b""
    return int(struct.unpack("<Q", data)[0]) if len(data) == 8 else 0


class Puller:
    """Starts pulls into one store and kills them."""

    def __init__(self, folder: Path, recipe: Recipe, url: str) -> None:
        self.store, self.recipe, self._url = Store(folder / "store"), recipe, url
        self._counter = folder / "counter"
        self.partial = self.store.root / "partial" / f"{recipe.sha256}.chunks"
        self.blob = self.store.blob(recipe.sha256)

    def run(self, moment: float | None) -> bool:
        """One pull, killed `moment` seconds after its first byte (None: never); whether it was done."""
        self._counter.unlink(missing_ok=True)
        before = held(self.partial, self.recipe)
        root = Path(__file__).parent.parent.parent
        command = [sys.executable, str(SCRIPT), str(self.store.root), self.recipe.sha256, self._url]
        process = subprocess.Popen(
            [*command, str(self._counter)], env={**os.environ, "PYTHONPATH": str(root)}
        )
        deadline = time.monotonic() + 30
        while process.poll() is None and not delivered(self._counter) and time.monotonic() < deadline:
            time.sleep(0.002)
        if moment is not None:
            time.sleep(moment)
            process.kill()
        code = process.wait(60)
        ended = self.blob.is_file()  # it may be killed after its work and before its end
        assert code == 0 or moment is not None
        pieces = self.recipe.pieces
        after = sum(piece.stored for piece in pieces) if ended else held(self.partial, self.recipe)
        lost = delivered(self._counter) - (after - before)
        in_flight = CONNECTIONS * (max(piece.stored for piece in pieces) + BLOCK)
        assert 0 <= lost <= in_flight, f"{lost} bytes have to be fetched again"
        return ended

    def finish(self) -> None:
        """Let it end; everything is sound then."""
        if not self.blob.is_file():
            assert self.run(None)
        assert hashlib.sha256(self.blob.read_bytes()).hexdigest() == self.recipe.sha256
        assert not self.partial.exists()


def kill_often(tmp_path: Path, times: int, seed: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_of(weights(layers=23)))
    recipe = publish_file(path, tmp_path / "mirror")
    server = RangeServer(tmp_path / "mirror")
    server.pause = 0.02
    puller = Puller(tmp_path, recipe, server.url)
    moments = random.Random(seed)
    for _ in range(times):
        if puller.run(moments.uniform(0, SOON)):
            puller.finish()
            shutil.rmtree(puller.store.root)
    puller.finish()
    server.close()


def test_five_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 5, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 200, seed=2)
