"""Prompts that are warm after eviction, unloading and a restart: over a counting model."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lichen.runtime import warmth
from lichen.runtime.adaptation import PLAIN, Adaptation
from lichen.runtime.engine import Engine
from lichen.runtime.generation import Generation, Mailbox
from lichen.runtime.sequence import Piece, SamplingOptions, Sequence
from lichen.runtime.spill import SpillStore, SpillStores
from tests.runtime.fake_native import END, CountingAdapter, CountingContext, CountingModel, CountingSampler
from tests.runtime.test_spill import KEY, files

SYSTEM = [n % 90 for n in range(40)]
ADAPTED = (Adaptation("a" * 64, 1.0), Adaptation("a" * 64, 0.5), Adaptation("b" * 64, 1.0))


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens count as many, and a moment as a while."""
    monkeypatch.setattr("lichen.runtime.drawing.Sampler", CountingSampler)
    monkeypatch.setattr("lichen.runtime.adapter_bank.Adapter", CountingAdapter)
    monkeypatch.setattr(warmth, "MIN_RESTORE", 8)
    monkeypatch.setattr(warmth, "MIN_SPILL", 16)
    monkeypatch.setattr(warmth, "IDLE_S", 0.01)


class Bench:
    """An engine over a counting context with a prefix cache on disk."""

    def __init__(self, folder: Path, *, slots: int = 2) -> None:
        self.context = CountingContext(slots=slots, context=128, batch=16)
        model: Any = CountingModel()
        context: Any = self.context
        stores = SpillStores(folder, 1 << 20, KEY)
        self.store = stores.of(PLAIN)
        self.store.wait_ready(5)
        self.engine = Engine(model, context, queue_limit=64, spill=stores)
        for adaptation in ADAPTED:
            stores.of(adaptation).wait_ready(5)
            self.engine.adapters.load(adaptation.digest, Path(adaptation.digest))  # nothing runs yet

    def submit(self, prompt: list[int], adaptation: Adaptation = PLAIN, **options: Any) -> Generation:
        mailbox = Mailbox()
        sequence = Sequence(
            prompt=prompt, options=SamplingOptions(**options), mailbox=mailbox, adaptation=adaptation
        )
        self.engine.submit(sequence)
        return Generation(sequence, mailbox, self.engine.cancel)

    async def cached(self, prompt: list[int], adaptation: Adaptation = PLAIN) -> int:
        """Answer a prompt; the tokens of it that were not computed."""
        generation = self.submit(prompt, adaptation, max_tokens=2)
        assert await generation.text() == f"{(prompt[-1] + 1) % 100} {(prompt[-1] + 2) % 100} "
        assert generation.finished is not None
        return generation.finished.usage.cached_tokens


@asynccontextmanager
async def running(folder: Path, *, slots: int = 2) -> AsyncIterator[Bench]:
    bench = Bench(folder, slots=slots)
    try:
        yield bench
    finally:
        bench.context.gate.set()
        await asyncio.to_thread(bench.engine.close)
        assert bench.context.closed


async def appeared(folder: Path, count: int) -> None:
    for _ in range(400):
        if len([path for path in files(folder) if path.suffix == ".kv"]) >= count:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{files(folder)}")


async def test_what_an_engine_held_the_next_one_restores(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 1]) == 0
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 2]) == len(SYSTEM)
        assert await bench.cached([*SYSTEM, 3]) == len(SYSTEM)
        assert bench.engine.counters().restored_tokens == len(SYSTEM), "the second came from a slot"
        assert len(files(tmp_path)) == 1, "nothing new is worth writing"


async def test_an_idle_engine_writes_so_that_a_kill_loses_little(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.cached([*SYSTEM, 1])
        await appeared(tmp_path, 1)
        async with running(tmp_path) as other:
            assert await other.cached([*SYSTEM, 2]) == len(SYSTEM)


async def test_a_slot_is_written_before_another_prompt_overwrites_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmth, "IDLE_S", 60)
    async with running(tmp_path, slots=1) as bench:
        await bench.cached([*SYSTEM, 1])
        await bench.cached([91, 92, 93])
        await appeared(tmp_path, 1)
        assert await bench.cached([*SYSTEM, 2]) == len(SYSTEM)


async def test_answers_that_a_closing_engine_cuts_leave_their_tokens(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.context.pace = 0.05
        answer = aiter(bench.submit([*SYSTEM, 1], max_tokens=90))  # held: one that nobody holds is cancelled
        async for event in answer:
            if isinstance(event, Piece):
                break
        assert await asyncio.to_thread(bench.engine.drain, 0.0) is False
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 2]) == len(SYSTEM)


async def test_streams_go_on_while_the_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as bench:
        await bench.cached([*SYSTEM, 1])
    original, disk = SpillStore.read, threading.Event()

    def slow(self: SpillStore, entry: int) -> bytearray | None:
        assert disk.wait(20)
        return original(self, entry)

    monkeypatch.setattr(SpillStore, "read", slow)
    async with running(tmp_path) as bench:
        stream = bench.submit([5], max_tokens=90)
        waiting = asyncio.ensure_future(bench.cached([*SYSTEM, 2]))
        await stream.text()
        assert not waiting.done()
        assert bench.engine.counters().completion_tokens == 90
        disk.set()
        assert await waiting == len(SYSTEM)


async def test_many_who_wait_for_one_beginning_read_it_once(tmp_path: Path) -> None:
    other = [n % 80 + 7 for n in range(50)]
    async with running(tmp_path) as bench:
        await bench.cached([*SYSTEM, 1])
        await bench.cached([*other, 1])
    async with running(tmp_path, slots=3) as bench:
        prompts = [[*(SYSTEM if n % 2 else other), n, n + 1] for n in range(12)]
        cached = await asyncio.gather(*map(bench.cached, prompts))
        assert sum(cached) >= 12 * len(SYSTEM)
        restored = bench.engine.counters().restored_tokens
        assert len(SYSTEM) + len(other) <= restored <= 3 * (len(SYSTEM) + len(other))


async def test_cancelling_one_who_waits_for_the_disk_lets_the_next_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as bench:
        await bench.cached([*SYSTEM, 1])
    original = SpillStore.read

    def slow(self: SpillStore, entry: int) -> bytearray | None:
        time.sleep(0.1)
        return original(self, entry)

    monkeypatch.setattr(SpillStore, "read", slow)
    async with running(tmp_path) as bench:
        gone, stays = bench.submit([*SYSTEM, 2]), asyncio.ensure_future(bench.cached([*SYSTEM, 3]))
        await asyncio.sleep(0.03)
        gone.close()
        assert await asyncio.wait_for(stays, 5) == len(SYSTEM)
        assert bench.engine.counters().cancelled == 1


async def test_damaged_and_refused_cells_are_computed_again(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.cached([*SYSTEM, 1])
    path = next(iter(files(tmp_path)))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 2]) == 0
    store = SpillStore(tmp_path, 1 << 20, KEY)
    store.clear()
    store.write([*SYSTEM, 1], b"whole, but not what this library reads")
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 2]) == 0
        assert bench.store.match([*SYSTEM, 1]) is None, "refused once, never read again"
    store.clear()


async def test_cells_of_other_tokens_than_the_file_says_are_not_used(tmp_path: Path) -> None:
    store = SpillStore(tmp_path, 1 << 20, KEY)
    store.write([*SYSTEM, 1], b'[[1, 2, 3], ["", 0]]')
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 2]) == 0


async def test_a_failed_engine_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmth, "IDLE_S", 60)
    async with running(tmp_path) as bench:
        await bench.cached([*SYSTEM, 1])
        bench.context.codes = [-3, -3]
        with pytest.raises(Exception, match="could not compute"):
            await bench.submit([50]).text()
    assert files(tmp_path) == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2]), st.integers(1, 90), st.integers(1, 9), st.booleans()),
        min_size=1,
        max_size=16,
    )
)
def test_whatever_happens_answers_are_right_and_nothing_is_left(
    requests: list[tuple[int, int, int, bool]],
) -> None:
    """Random beginnings, lengths and cancellations over two lives of an engine: the counting context
    proves that every slot holds what the engine thinks."""

    async def ask(bench: Bench, kind: int, size: int, limit: int, leave: bool) -> None:
        prompt = [(n * (kind + 1)) % 90 for n in range(size)]
        generation = bench.submit(prompt, max_tokens=limit)
        if leave:
            await asyncio.sleep(0)
            generation.close()
            return
        following = [prompt[-1] + 1 + n for n in range(limit)]
        assert await generation.text() == "".join(f"{token} " for token in following if token < END)

    async def live(folder: Path) -> None:
        async with running(folder) as bench:
            await asyncio.gather(*(ask(bench, *request) for request in requests))
            for _ in range(400):
                if not bench.engine._admission.count:
                    break
                await asyncio.sleep(0.005)
            for slot, held in bench.context.held.items():
                assert list(bench.engine._slots.tokens(slot)) == held

    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            asyncio.run(live(Path(folder)))


async def test_what_an_adapter_computed_is_on_disk_for_it_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        for adaptation in ADAPTED:
            assert await bench.cached([*SYSTEM, 1], adaptation) == 0
    async with running(tmp_path) as bench:
        assert await bench.cached([*SYSTEM, 2]) == 0
        for adaptation in ADAPTED[1:]:
            assert await bench.cached([*SYSTEM, 2], adaptation) == len(SYSTEM)
        assert bench.engine.counters().restored_tokens == 2 * len(SYSTEM)
