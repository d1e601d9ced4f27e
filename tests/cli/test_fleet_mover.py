"""The daemon moves to what was confirmed, not to what is on trial; what could not be loaded comes later."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lichen.cli import fleet_daemon
from lichen.cli.fleet_daemon import Answered, Mover
from lichen.config import Config
from lichen.errors import EngineError
from lichen.runtime.counters import Counters
from lichen.runtime.pool import ModelPool
from lichen.sync.manifest import make_manifest
from lichen.sync.updates.slots import Slots, Version
from tests.runtime.test_pool_renew import MovingShelf
from tests.sync.hostile_repository import manifest


async def means(pool: ModelPool) -> str:
    """The model that answers under the fleet's name."""
    async with pool.use("fleet:it") as model:
        return model.info.name


async def test_the_daemon_moves_once_a_version_is_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, slots = MovingShelf(100, a=30, b=30), Slots(tmp_path / "store")
    pool = shelf.pool(keep_alive=-1)
    mover = Mover(Config(home=tmp_path), pool)
    await mover.look()  # nothing is here yet
    assert await means(pool) == "a"
    shelf.meaning["fleet:it"] = "b"
    fields = make_manifest(manifest("models/it", 1), running="0.1.0")
    slots.switch("models/it", Version(target="models/it", sha256="b" * 64, manifest=fields))
    await mover.look()
    assert await means(pool) == "a", "it is on trial"
    slots.confirm("models/it")
    shelf.failures["b"] = EngineError("no memory just now")
    await mover.look()
    del shelf.failures["b"]
    await mover.look()
    assert await means(pool) == "a", "not at once"
    monkeypatch.setattr(fleet_daemon, "AGAIN_S", 0.0)
    shelf.failures["b"] = EngineError("no memory just now")
    mover._again_at = 0.0
    await mover.look()
    del shelf.failures["b"]
    await mover.look()
    assert await means(pool) == "b"
    await pool.close()


class Answering:
    """A served model of which only the counters matter."""

    def __init__(self, sha256: str) -> None:
        self.info = SimpleNamespace(sha256=sha256)
        self.engine = self
        self.now = Counters()

    def counters(self) -> Counters:
        """As the engine's."""
        return self.now


def test_what_a_file_answered_is_counted_over_loads() -> None:
    answered, first = Answered(), Answering("a" * 64)
    models: list[Any] = [first]
    answered.look(models)
    first.now = Counters(completed=4, failed=1, cancelled=7)
    answered.look(models)
    answered.look(models)
    assert answered.by_sha256["a" * 64] == (5, 1)
    again = Answering("a" * 64)  # unloaded and loaded again: its counters begin at 0
    again.now = Counters(completed=2)
    models = [again, Answering("b" * 64)]
    answered.look(models)
    assert answered.by_sha256 == {"a" * 64: (7, 1)}
