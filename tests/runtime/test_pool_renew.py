"""A name that means another model from now on: no request is dropped, and the old model goes when idle."""

from __future__ import annotations

import asyncio

import pytest

from lichen.errors import EngineError
from lichen.runtime.resident import Candidate
from tests.runtime.fake_shelf import FakeShelf
from tests.runtime.test_pool import names, until


class MovingShelf(FakeShelf):
    """`meaning` says which model a name of the fleet is now."""

    def __init__(self, capacity: int = 100, **sizes: int) -> None:
        super().__init__(capacity, **sizes)
        self.meaning = {"fleet:it": "a", "default": "a"}

    def find(self, name: str) -> Candidate:
        return super().find(self.meaning.get(name, name))


async def test_requests_go_on_while_a_name_moves() -> None:
    shelf = MovingShelf(100, a=30, b=30)
    pool = shelf.pool(keep_alive=-1)
    async with pool.use("fleet:it") as old:
        shelf.meaning["fleet:it"] = "b"
        shelf.gate.clear()
        moving = asyncio.ensure_future(pool.renew("fleet:it"))
        await until(lambda: shelf.loads == ["a", "b"])
        async with pool.use("fleet:it") as meanwhile:
            assert meanwhile is old, "who comes while the new one loads is answered by the old one"
        shelf.gate.set()
        assert await moving
        async with pool.use("fleet:it") as new:
            assert new.info.name == "b"
        assert names(pool) == {"a", "b"}, "the old one still answers"
    await until(lambda: names(pool) == {"b"})
    assert not await pool.renew("fleet:it"), "nothing to do"
    assert not await pool.renew("fleet:other"), "what is not loaded is found when it is asked for"
    await pool.close()


async def test_the_pin_goes_with_the_name() -> None:
    shelf = MovingShelf(100, a=30, b=30)
    pool = shelf.pool(keep_alive=0)
    await pool.load(pin=True)
    shelf.meaning["default"] = "b"
    assert await pool.renew()
    await until(lambda: names(pool) == {"b"})
    assert pool.loaded()[0].pinned
    await pool.close()


async def test_the_new_model_stays_as_long_as_the_old_one_was_to() -> None:
    """Whatever was said when it was loaded for its trial."""
    shelf = MovingShelf(100, a=30, b=30)
    pool = shelf.pool(keep_alive=-1)
    await pool.load("fleet:it")
    async with pool.use("b", keep_alive=0.02):
        pass
    shelf.meaning["fleet:it"] = "b"
    assert await pool.renew("fleet:it")
    await asyncio.sleep(0.06)
    assert names(pool) == {"b"}
    await pool.close()


async def test_a_name_that_is_being_loaded_moves_too() -> None:
    shelf = MovingShelf(100, a=30, b=30)
    pool = shelf.pool(keep_alive=-1)
    shelf.gate.clear()
    loading = asyncio.ensure_future(pool.load("fleet:it"))
    await until(lambda: shelf.loads == ["a"])
    shelf.meaning["fleet:it"] = "b"
    moving = asyncio.ensure_future(pool.renew("fleet:it"))
    await asyncio.sleep(0)
    shelf.gate.set()
    await loading
    assert await moving
    async with pool.use("fleet:it") as model:
        assert model.info.name == "b"
    await pool.close()


async def test_where_both_do_not_fit_the_next_request_waits_for_the_new_one() -> None:
    shelf = MovingShelf(100, a=80, b=90)
    pool = shelf.pool(keep_alive=-1, wait=0.05)
    await pool.load(pin=True)
    shelf.meaning["default"] = "b"
    assert await pool.renew()
    async with pool.use() as model:
        assert model.info.name == "b"
    assert names(pool) == {"b"}
    await pool.close()


async def test_a_version_that_does_not_load_leaves_the_name_where_it_is() -> None:
    shelf = MovingShelf(100, a=30, b=30)
    shelf.failures["b"] = EngineError("broken")
    pool = shelf.pool(keep_alive=-1)
    async with pool.use("fleet:it"):
        pass
    shelf.meaning["fleet:it"] = "b"
    with pytest.raises(EngineError):
        await pool.renew("fleet:it")
    async with pool.use("fleet:it") as model:
        assert model.info.name == "a"
    await pool.close()
