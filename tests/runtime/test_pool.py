"""The pool's decisions, with models that only take up memory; real models are in test_pool_real.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.errors import EngineError, LichenError, ModelFileError, NotFound, OutOfMemory, Unavailable
from lichen.runtime.pool import ModelPool
from lichen.runtime.resident import LoadProgress
from lichen.runtime.served_model import ServedModel
from tests.runtime.fake_shelf import FakeModel, FakeShelf


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen within two seconds")


def fake(model: ServedModel) -> FakeModel:
    return cast(FakeModel, model)


def names(pool: ModelPool) -> set[str]:
    return {status.name for status in pool.loaded()}


async def touch(pool: ModelPool, *wanted: str) -> None:
    for name in wanted:
        async with pool.use(name) as model:
            assert model.info.name == name.lower()


async def test_the_longest_idle_model_makes_room() -> None:
    shelf = FakeShelf(100, a=40, b=40, c=40, d=30)
    pool = shelf.pool()
    await touch(pool, "a", "b", "a", "c")
    assert names(pool) == {"a", "c"}
    await touch(pool, "d")
    assert names(pool) == {"c", "d"}
    assert shelf.most <= 100
    await pool.close()
    assert shelf.used == 0


async def test_a_pinned_model_stays_and_unpinned_goes() -> None:
    shelf = FakeShelf(100, a=60, b=60, c=90)
    pool = shelf.pool()
    await touch(pool, "a")
    pool.pin("a")
    async with pool.use("b") as model:  # beside a pinned one it gets less
        assert model.fitted is not None
        assert model.fitted.note == "shrunk"
    with pytest.raises(OutOfMemory) as caught:
        await touch(pool, "c")
    assert (caught.value.needed, caught.value.free) == (45, 40)
    assert names(pool) == {"a", "b"}, "nothing was evicted in vain"
    pool.pin("a", False)
    await touch(pool, "c")
    assert names(pool) == {"c"}
    await pool.close()


async def test_many_share_one_load_under_all_its_names() -> None:
    shelf = FakeShelf(100, a=40)
    shelf.gate.clear()
    pool = shelf.pool()
    users = [asyncio.ensure_future(touch(pool, name)) for name in ("a", "A", "a", "A")]
    await until(lambda: shelf.loads == ["a"])
    shelf.gate.set()
    await asyncio.gather(*users)
    assert shelf.loads == ["a"]
    await pool.close()


async def test_a_failed_load_fails_all_who_wait_and_the_next_request_tries_again() -> None:
    shelf = FakeShelf(100, a=40, b=10)
    pool = shelf.pool()
    await touch(pool, "b")
    for broken, kind in ((ModelFileError("bad"), ModelFileError), (ZeroDivisionError(), EngineError)):
        shelf.failures["a"] = broken
        shelf.gate.clear()
        users = [asyncio.ensure_future(touch(pool, "a")) for _ in range(3)]
        await until(lambda: "a" in shelf.loads)
        shelf.gate.set()
        outcomes = await asyncio.gather(*users, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [kind] * 3
        assert names(pool) == {"b"}
        shelf.loads.clear()
    del shelf.failures["a"]
    await touch(pool, "a")
    await pool.close()
    assert shelf.used == 0


async def test_idle_models_go_after_keep_alive() -> None:
    pool = FakeShelf(100, a=10, b=10, c=10, d=10).pool(keep_alive=0.05)
    await touch(pool, "a", "b")
    async with pool.use("c", keep_alive=-1):
        pass
    async with pool.use("d", keep_alive=0):
        assert "d" in names(pool)
    await until(lambda: "d" not in names(pool))
    async with pool.use("b"):
        await until(lambda: "a" not in names(pool))
        await asyncio.sleep(0.1)
        assert "b" in names(pool), "a model that is used has no clock"
    await until(lambda: names(pool) == {"c"})
    (status,) = pool.loaded()
    assert status.expires_in_s is None
    assert status.idle_s is not None
    await pool.close()


async def test_a_load_that_nobody_waits_for_any_more_is_given_up() -> None:
    shelf = FakeShelf(100, a=40)
    shelf.gate.clear()
    pool = shelf.pool()
    users = [asyncio.ensure_future(touch(pool, "a")) for _ in range(2)]
    await until(lambda: shelf.loads == ["a"])
    users[0].cancel()
    await asyncio.sleep(0.01)
    assert shelf.given_up == 0, "one still waits"
    users[1].cancel()
    await until(lambda: shelf.given_up == 1)
    shelf.gate.set()
    await touch(pool, "a")
    await pool.close()
    assert shelf.used == 0


async def test_a_load_cancelled_before_its_first_step_strands_nobody() -> None:
    shelf = FakeShelf(100, a=40)
    pool = shelf.pool()
    for pause in range(6):
        user = asyncio.ensure_future(touch(pool, "a"))
        for _ in range(pause):
            await asyncio.sleep(0)
        user.cancel()
        await asyncio.wait({user})
        loads = len(shelf.loads)
        await asyncio.wait_for(touch(pool, "a"), 2)
        assert len(shelf.loads) - loads <= 1, "at most one load more for who comes next"
        assert names(pool) == {"a"}
        assert shelf.used == 40
        assert await pool.unload("a") == 40
        assert (names(pool), shelf.used) == (set(), 0)
    await pool.close()


async def test_closing_while_loading_ends_the_load_and_tells_who_waits() -> None:
    shelf = FakeShelf(100, a=40, b=40)
    pool = shelf.pool()
    await touch(pool, "b")
    shelf.gate.clear()
    user = asyncio.ensure_future(touch(pool, "a"))
    await until(lambda: "a" in shelf.loads)
    await pool.close()
    with pytest.raises(Unavailable):
        await user
    with pytest.raises(Unavailable):
        await touch(pool, "b")
    assert shelf.used == 0
    await pool.close()


async def test_a_busy_model_is_waited_for_and_never_evicted() -> None:
    shelf = FakeShelf(100, a=80, b=90)
    pool = shelf.pool(wait=0.3)
    async with pool.use("a") as held:
        with pytest.raises(Unavailable, match="answering"):
            await touch(pool, "b")
        with pytest.raises(Unavailable, match="still answering"):
            await pool.unload("a")
        waiting = asyncio.ensure_future(touch(pool, "b"))
        await asyncio.sleep(0.02)
        assert not fake(held).closed
    await waiting
    assert names(pool) == {"b"}
    await pool.close()


async def test_max_models() -> None:
    pool = FakeShelf(100, a=10, b=10, c=10).pool(max_models=2, wait=0.05)
    await touch(pool, "a", "b", "c")
    assert names(pool) == {"b", "c"}
    pool.pin("b")
    pool.pin("c")
    with pytest.raises(Unavailable, match="2 pinned"):
        await touch(pool, "a")
    await pool.close()


async def test_the_default_model_is_taken_over_pinned_and_answers_to_its_names() -> None:
    shelf = FakeShelf(100, a=40, b=90)
    pool = shelf.pool(keep_alive=0)
    progress = LoadProgress()
    candidate = shelf.find("a")
    loading = asyncio.to_thread(shelf.load, candidate, shelf.fit(candidate, None), progress)
    await pool.start(loading, progress)
    async with pool.use() as first, pool.use("default") as second, pool.use("a") as third:
        assert first is second is third
    await asyncio.sleep(0.02)
    (status,) = pool.loaded()
    assert (status.name, status.pinned, status.progress) == ("a", True, 1.0)
    assert await pool.unload() == 40
    await touch(pool, "b")
    await until(lambda: not pool.loaded())
    async with pool.use() as again:
        assert again is not first
    assert pool.loaded()[0].pinned, "the default one is pinned whenever it comes"
    await pool.close()


async def test_load_reports_progress_and_pins() -> None:
    shelf = FakeShelf(100, a=10, b=10)
    pool = shelf.pool(keep_alive=0)
    shelf.gate.clear()
    seen: list[float] = []
    load = asyncio.ensure_future(pool.load("b", pin=True, progress=seen.append))
    await until(lambda: 1.0 in seen)
    shelf.gate.set()
    status = await load
    assert (status.state, status.pinned) == ("ready", True)
    await asyncio.sleep(0.02)
    assert names(pool) == {"b"}
    cancelled = asyncio.ensure_future(pool.load("a", progress=seen.append))
    shelf.gate.clear()
    await until(lambda: shelf.loads[-1] == "a")
    cancelled.cancel()
    await until(lambda: names(pool) == {"b"})
    for missing in ("z", "A"):
        with pytest.raises(NotFound):
            await pool.unload(missing)
    with pytest.raises(NotFound):
        await pool.load("z")
    await pool.close()


async def test_a_failed_engine_is_loaded_anew() -> None:
    shelf = FakeShelf(100, a=10, b=10)
    pool = shelf.pool()
    async with pool.use("b") as model:
        fake(model).engine.state = "failed"
    await until(lambda: fake(model).closed)
    await touch(pool, "b")
    assert shelf.loads == ["b", "b"]
    assert await pool.drain(1)
    await pool.close()


Visit = tuple[str, float, float, float | None, bool]
VISITS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.floats(0, 0.01),  # seconds before
        st.floats(0, 0.01),  # seconds of use
        st.sampled_from([None, 0.0, 0.005, -1.0]),
        st.booleans(),  # cancelled meanwhile
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(VISITS)
def test_any_traffic_stays_within_memory_and_never_loses_a_used_model(visits: list[Visit]) -> None:
    async def visit(pool: ModelPool, name: str, pause: float, stay: float, keep: float | None) -> None:
        await asyncio.sleep(pause)
        try:
            async with pool.use(name, keep) as model:
                assert model.info.name == name
                await asyncio.sleep(stay)
                assert not fake(model).closed
        except LichenError as error:
            assert isinstance(error, Unavailable | OutOfMemory), error

    async def traffic() -> None:
        shelf = FakeShelf(100, a=30, b=50, c=60, d=120)
        pool = shelf.pool(keep_alive=0.004, wait=0.5)
        tasks = [asyncio.ensure_future(visit(pool, *planned[:4])) for planned in visits]
        await asyncio.sleep(0.006)
        for task, (*_, cancelled) in zip(tasks, visits, strict=True):
            if cancelled:
                task.cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), (
            outcomes
        )
        await asyncio.wait_for(pool.close(), 5)
        assert shelf.used == 0
        assert shelf.most <= shelf.capacity

    asyncio.run(traffic())


async def test_a_swap_takes_over_and_what_runs_ends_on_the_old_one() -> None:
    shelf = FakeShelf(100, a=40)
    pool = shelf.pool()
    await pool.load("default")
    running = pool.use()
    old = fake(await running.__aenter__())
    await pool.swap()
    async with pool.use("a") as now, pool.use() as default:
        assert fake(now) is fake(default) is not old
    assert not old.closed, "a request is not done with it yet"
    assert pool.ready() == [now], "the old one counts no more"
    assert names(pool) == {"a", "a (ending)"}
    with pytest.raises(Unavailable, match="swapped"):
        await pool.swap()
    await running.__aexit__(None, None, None)
    await until(lambda: old.closed)
    assert names(pool) == {"a"}
    assert next(status.pinned for status in pool.loaded()), "the default one stays"
    await pool.swap()
    await until(lambda: names(pool) == {"a"})
    await pool.close()
    assert shelf.used == 0


async def test_a_swap_that_does_not_fit_changes_nothing() -> None:
    shelf = FakeShelf(70, a=40)
    pool = shelf.pool()
    await pool.load("default")
    with pytest.raises(OutOfMemory, match="beside itself"):
        await pool.swap()
    shelf.capacity = 100
    shelf.failures["a"] = EngineError("no")
    with pytest.raises(EngineError):
        await pool.swap()
    await touch(pool, "a")
    assert len(shelf.loads) == 2
    with pytest.raises(NotFound):
        await pool.swap("b")
    await pool.close()
    assert shelf.used == 0


async def test_no_request_is_lost_while_models_are_swapped() -> None:
    shelf = FakeShelf(200, a=40)
    pool = shelf.pool()
    await pool.load("default")
    done = 0

    async def user() -> None:
        nonlocal done
        while not over:
            async with pool.use() as model:
                await asyncio.sleep(0.002)
                assert not fake(model).closed
            done += 1

    over = False
    users = [asyncio.create_task(user()) for _ in range(8)]
    for _ in range(5):
        await pool.swap()
        await until(lambda: names(pool) == {"a"})
    over = True
    await asyncio.gather(*users)
    assert done > 20
    await pool.close()
    assert shelf.used == 0
