"""A daemon on its plan: layouts swapped in under load, and changes with hysteresis."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lichen.cli.top import plan_lines
from lichen.config import load
from lichen.devices.drift import Hysteresis, Window
from lichen.errors import QueueFull
from lichen.planning import Asked, Planned, plan_for, wish_of
from lichen.replanning import Replanning
from lichen.runtime.layouts import find
from lichen.runtime.pool import ModelPool
from lichen.runtime.sequence import Finished, SamplingOptions
from lichen.shelf import StoreShelf
from tests.cli.test_plan import DIGEST, measured

__all__ = ["measured"]

QUIET = Window(
    busy=10.0,
    active=1.0,
    requests=20,
    completed=20,
    prompt_tokens=400,
    cached_tokens=0,
    completion_tokens=1300,
    first_tokens=20,
    ttft_s=1.0,
)
CROWD = msgspec.structs.replace(QUIET, active=8.0, completion_tokens=1800)


def planned(home: Path, model: Path, **flags: Any) -> Planned:
    config = load({"home": str(home), "model": str(model), "context": 256, **flags}, {}).config
    asked = Asked(name=model.stem, path=model, sha256=DIGEST)
    return plan_for(config, asked, wish_of(config), given={"context": 256})


async def begun(plan: Planned, **options: Any) -> tuple[ModelPool, Replanning, list[str]]:
    said: list[str] = []
    shelf = StoreShelf(plan.config)
    pool = ModelPool(shelf)
    replanning = Replanning(plan, shelf, said.append, **options)
    await pool.load()
    return pool, replanning, said


async def ask(pool: ModelPool) -> str:
    options = SamplingOptions(max_tokens=8, temperature=0)
    async with pool.use() as model:
        [generation] = await model.complete("1, 2, 3, 4,", options)
        reasons = [event.reason async for event in generation if isinstance(event, Finished)]
        return str(reasons[0])


async def test_a_crowd_gets_more_slots_and_no_request_is_lost(measured: Path, model_path: Path) -> None:
    plan = planned(measured, model_path, intent="latency", objectives="users=1, prompt=20, answer=64")
    pool, replanning, said = await begun(plan, hysteresis=Hysteresis(times=2, rest_s=60))
    assert replanning.plan.slots == 1
    over, answers = False, list[str]()

    async def user() -> None:
        while not over:
            try:
                answers.append(await ask(pool))
            except QueueFull:
                await asyncio.sleep(0.01)

    users = [asyncio.create_task(user()) for _ in range(3)]
    await replanning.consider(pool, QUIET, 0.0)
    assert not said
    for now in (10.0, 20.0):
        await replanning.consider(pool, CROWD, now)
    over = True
    await asyncio.gather(*users)
    assert replanning.plan.slots > 1
    assert len(said) == 1 and "8 are answered at once" in said[0]
    async with pool.use() as model:
        assert model.options.slots == replanning.plan.slots
    assert answers and set(answers) == {"length"}
    for now in (30.0, 40.0, 50.0):
        await replanning.consider(pool, QUIET, now)
    assert len(said) == 1, "it rests after a change"
    assert pool.plan is not None and pool.plan.changes == 1
    assert any("8 are answered" in line for line in plan_lines(msgspec.to_builtins(pool.plan)))
    await pool.close()


async def test_a_crowd_that_no_plan_can_please_gets_the_best_there_is(
    measured: Path, model_path: Path
) -> None:
    load = "users=1, prompt=20, answer=64"
    alone = planned(measured, model_path, intent="latency", objectives=load).now.prediction
    strict = f"{load}, ttft={1.02 * alone.ttft:.6f}s"
    plan = planned(measured, model_path, intent="latency", objectives=strict)
    pool, replanning, said = await begun(plan, hysteresis=Hysteresis(times=1, rest_s=0))
    assert replanning.plan.slots == 1
    await replanning.consider(pool, CROWD, 0.0)
    assert replanning.plan.slots > 1, (
        "eight users cannot have a first token as early as one, but earlier than so"
    )
    assert len(said) == 1
    quiet = QUIET.load()
    assert quiet is not None and quiet.users == 1
    assert replanning._expected(quiet, 300.0).users == 8, "who has just left may come back"
    assert replanning._expected(quiet, 601.0).users == 1
    await pool.close()


async def test_a_plan_has_room_for_the_users_that_were_named(measured: Path, model_path: Path) -> None:
    plan = planned(measured, model_path, intent="throughput", objectives="users=4, prompt=20, answer=64")
    pool, replanning, said = await begun(plan, hysteresis=Hysteresis(times=1, rest_s=0))
    before = replanning.plan.slots
    assert before > 1
    await replanning.consider(pool, QUIET, 0.0)
    assert replanning.plan.slots >= before, said
    await pool.close()


async def test_too_little_memory_gives_a_smaller_plan(measured: Path, model_path: Path) -> None:
    plan = planned(measured, model_path, intent="throughput", objectives="users=8, prompt=20, answer=64")
    left = [1 << 30]
    pool, replanning, said = await begun(
        plan, hysteresis=Hysteresis(times=1, rest_s=0), available=lambda: left[0]
    )
    before = replanning.planned.now.prediction.memory
    left[0] = 0
    await replanning.consider(pool, CROWD, 0.0)
    assert "memory is short" in said[-1]
    assert replanning.planned.now.prediction.memory < 0.86 * before
    assert await ask(pool) == "length"
    await pool.close()


async def test_what_can_change_while_it_runs_does(measured: Path, model_path: Path) -> None:
    plan = planned(measured, model_path, intent="latency", objectives="users=4, prompt=100, answer=64")
    pool, replanning, said = await begun(plan)
    async with pool.use() as model:
        other = 32 if replanning.plan.chunk == 64 else 64
        wider = msgspec.structs.replace(plan.now, plan=msgspec.structs.replace(replanning.plan, chunk=other))
        await replanning._change(pool, wider, "a test says so", 0.0)
        assert await ask(pool) == "length"
        assert model.engine.scheduler.budget.share == other
        assert pool.served() is model, "nothing was loaded"
    assert "a test says so" in said[0]
    await pool.close()


@pytest.mark.slow
async def test_a_layout_is_made_and_taken_up_while_requests_run(
    measured: Path, model_path: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "fingerprints").symlink_to(measured / "fingerprints")
    plan = planned(home, model_path, intent="throughput", objectives="users=8, prompt=20, answer=64")
    layout = plan.wanted
    assert layout in ("q8_0", "f16")
    pool, replanning, said = await begun(plan)
    making = asyncio.create_task(replanning.bring_layout(pool))
    answers = [await ask(pool)]
    while not making.done():
        answers += await asyncio.gather(*(ask(pool) for _ in range(4)))
    assert await making
    answers += await asyncio.gather(*(ask(pool) for _ in range(4)))
    assert set(answers) == {"length"}
    found = find(home, DIGEST, layout)
    assert found is not None
    async with pool.use() as model:
        assert model.info.sha256 == found[0].sha256
    assert f"layout {layout}" in said[-1]
    again = planned(home, model_path, intent="throughput", objectives="users=8, prompt=20, answer=64")
    assert again.wanted is None and again.path == found[1], "the next start uses it at once"
    await pool.close()
