"""What a daemon learns: its jobs, who makes them, and the models that they are about."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lichen.adapters.files import FileStore
from lichen.adapters.gate import Limits
from lichen.adapters.jobs import JobStore
from lichen.adapters.registry import Registry
from lichen.adapters.thread import JournalThread
from lichen.devices import probe as machine
from lichen.runtime import memory
from lichen.runtime.initiative import Initiative, Options
from lichen.runtime.learning import Learning, require_torch
from lichen.runtime.pool import ModelPool


class DaemonLearning:
    """Jobs over the models of a pool. limits: of the gate. initiative: when it learns by itself."""

    def __init__(
        self,
        pool: ModelPool,
        jobs: JobStore,
        files: FileStore,
        registry: Registry,
        journal: JournalThread,
        limits: Limits,
        initiative: Options,
    ) -> None:
        self._pool, self._journal, self._options = pool, journal, initiative
        self.store = jobs
        self.jobs = Learning(
            jobs,
            files,
            registry,
            locate=self._file,
            busy=self._busy,
            threads=machine.probe().physical_cores,
            memory=self._free,
            journal=journal,
            limits=limits,
        )

    async def run(self) -> None:
        """Carry out jobs, and make some where the policy says so, until cancelled."""
        initiative = Initiative(
            self.jobs,
            self._journal,
            self._options,
            model=lambda: None if (served := self._pool.served()) is None else served.info.name,
            requests=lambda: sum(model.engine.counters().requests for model in self._pool.ready()),
            busy=self._busy,
            free=self._free,
        )
        looks = asyncio.ensure_future(initiative.run())
        try:
            await self.jobs.run()
        finally:
            looks.cancel()
            await asyncio.gather(looks, return_exceptions=True)

    async def adaptable(self, name: str) -> str:
        """A model's name as clients see it. Raises NotFound, and TrainingError where none can be trained."""
        require_torch()
        served = self._pool.served(name)
        if served is not None:
            return served.info.name
        return (await asyncio.to_thread(self._pool.shelf.find, name)).name

    async def _file(self, name: str) -> Path:
        """Where a model lies. Raises NotFound."""
        served = self._pool.served(name)
        if served is not None:
            return served.path
        return (await asyncio.to_thread(self._pool.shelf.find, name)).path

    def _busy(self) -> bool:
        """Whether a request is in an engine, running or waiting."""
        counters = (model.engine.counters() for model in self._pool.ready())
        return any(now.running or now.waiting for now in counters)

    def _free(self) -> int:
        return memory.available(self._pool.options.memory_limit)
