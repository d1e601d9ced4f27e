"""Learning over the models of a daemon: who carries out jobs, and who makes them by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lichen.adapters.files import FileStore
from lichen.adapters.jobs import JobStore
from lichen.adapters.registry import Registry
from lichen.adapters.thread import JournalThread
from lichen.devices import probe as machine
from lichen.runtime import memory
from lichen.runtime.initiative import Initiative, Options
from lichen.runtime.learning import Learning
from lichen.runtime.pool import ModelPool


def learning_over(
    pool: ModelPool, jobs: JobStore, files: FileStore, adapters: Path, journal: JournalThread
) -> Learning:
    """Who carries out jobs for these models. adapters: folder of the registry."""

    async def locate(name: str) -> Path:
        served = pool.served(name)
        return served.path if served is not None else (await asyncio.to_thread(pool.shelf.find, name)).path

    return Learning(
        jobs,
        files,
        Registry(adapters),
        locate=locate,
        busy=lambda: _busy(pool),
        threads=machine.probe().physical_cores,
        memory=lambda: memory.available(pool.options.memory_limit),
        journal=journal,
    )


async def learn(learning: Learning, journal: JournalThread, options: Options, pool: ModelPool) -> None:
    """Carry out jobs, and make some where the policy says so, until cancelled."""
    initiative = Initiative(
        learning,
        journal,
        options,
        model=lambda: None if (served := pool.served()) is None else served.info.name,
        requests=lambda: sum(model.engine.counters().requests for model in pool.ready()),
        busy=lambda: _busy(pool),
        free=lambda: memory.available(pool.options.memory_limit),
    )
    looks = asyncio.ensure_future(initiative.run())
    try:
        await learning.run()
    finally:
        looks.cancel()
        await asyncio.gather(looks, return_exceptions=True)


def _busy(pool: ModelPool) -> bool:
    return any(model.engine.busy for model in pool.ready())
