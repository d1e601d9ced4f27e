"""The fleet's updates in a daemon: taken on a thread of their own, and moved to without dropping a request.

`Mover` runs on the daemon's event loop, needs no TUF, and also moves to what `lichen fleet pull` brought.
`Taker` is the thread: it has an event loop of its own, since the record of updates, hashing and verification
block; only trials and moves cross over to the daemon's loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import lichen
from lichen.cli.fleet_adapters import follow
from lichen.config import Config
from lichen.errors import LichenError
from lichen.runtime.pool import ModelPool
from lichen.sync.store import FLEET
from lichen.sync.updates.health import Answer, Installed, Prompt
from lichen.sync.updates.slots import Slots

if TYPE_CHECKING:
    from lichen.runtime.engine import Engine
    from lichen.runtime.served_model import ServedModel

LOOK_S = 1.0  # between two looks at what is in use
AGAIN_S = 30.0  # before a version that could not be loaded is tried again
FIRST_S = 10.0  # after the start, before the first look for updates

log = logging.getLogger("lichen.fleet")
Result = TypeVar("Result")


class Mover:
    """Lets the names `fleet:NAME` mean the version in use once it is confirmed, and adapters serve."""

    def __init__(self, config: Config, pool: ModelPool) -> None:
        self._config, self._pool = config, pool
        self._slots = Slots(config.home / "store")
        self._file = config.home / "store" / "active"
        self._seen: tuple[int, int] | None = None
        self._again_at = 0.0  # on the loop's clock
        self.answered = Answered()

    async def run(self) -> None:
        """Look for ever; cancel it."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self.answered.look(self._pool.ready())
                await self.look()
            except Exception:
                log.exception("The daemon could not move to another version.")

    async def look(self) -> None:
        """Move to what was confirmed since the last look; what could not be loaded then is tried again."""
        stamp, now = await asyncio.to_thread(_stamp, self._file), asyncio.get_running_loop().time()
        if stamp == self._seen and now < self._again_at:
            return
        self._seen, self._again_at = stamp, math.inf
        for line in await asyncio.to_thread(follow, self._config, self._slots):
            log.info("%s", line)
        slots = await asyncio.to_thread(self._slots.mendable)
        for slot, found in slots.items():
            kind, _, name = slot.partition("/")
            if kind != "models" or not found.confirmed:
                continue
            own = [None] if self._config.model == f"{FLEET}{name}" else []
            for alias in (*own, f"{FLEET}{name}"):
                try:
                    if await self._pool.renew(alias):
                        log.info("%s%s is another version from now on.", FLEET, name)
                except LichenError as error:
                    log.warning("%s%s stays at its version for now: %s", FLEET, name, error)
                    self._again_at = now + AGAIN_S


class Answered:
    """What each file has answered since the daemon began, over loads and unloads: (answers, failures)."""

    def __init__(self) -> None:
        self._before: WeakKeyDictionary[Engine, tuple[int, int]] = WeakKeyDictionary()
        self.by_sha256: dict[str, tuple[int, int]] = {}  # replaced, never changed: other threads read it

    def look(self, models: Iterable[ServedModel]) -> None:
        """Count what came since the last look. On the daemon's loop."""
        found = dict(self.by_sha256)
        for model in models:
            counters = model.engine.counters()
            now = (counters.completed + counters.failed, counters.failed)
            before = self._before.get(model.engine, (0, 0))
            if now != before:
                answers, failures = found.get(model.info.sha256, (0, 0))
                found[model.info.sha256] = (answers + now[0] - before[0], failures + now[1] - before[1])
                self._before[model.engine] = now
        self.by_sha256 = found


class Taker:
    """The thread that takes updates. loop: the daemon's, on which `pool` lives."""

    def __init__(
        self, config: Config, pool: ModelPool, loop: asyncio.AbstractEventLoop, answered: Answered
    ) -> None:
        self._config, self._pool, self._loop, self._answered = config, pool, loop, answered
        self._told: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lichen-fleet", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End it soon; what is under way goes on at the next start."""
        self._stop.set()

    def _run(self) -> None:
        pause = min(FIRST_S, self._config.fleet_every)
        while not self._stop.wait(pause):
            try:
                asyncio.run(self._until_stopped(self._take()))
            except LichenError as error:
                log.warning("No updates from the fleet now: %s", error)
            except asyncio.CancelledError:
                return
            except Exception:
                log.exception("Taking updates failed.")
            pause = self._config.fleet_every * random.uniform(0.9, 1.1)  # not all machines at once

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait({task}, timeout=0.2)
            if self._stop.is_set():
                task.cancel()
        await task

    async def _take(self) -> None:
        from lichen.devices.hardware import class_here
        from lichen.devices.probe import probe
        from lichen.sync.pace import RateLimit
        from lichen.sync.store import Store
        from lichen.sync.trust.device import Device
        from lichen.sync.trust.member import Member, Served
        from lichen.sync.updates import schedule

        config = self._config
        rules = schedule.Rules(
            window=config.fleet_window, metered=config.fleet_metered, battery=config.fleet_battery
        )
        threads = config.threads or probe().physical_cores
        folder = config.home / "fleet"
        member = Member(
            Device(folder),
            folder,
            Store(config.home / "store"),
            _CrossingTrial(self._pool, threads, self._loop),
            running=lichen.__version__,
            clock=time.time,
            hardware=class_here(),
            permit=lambda update: schedule.waits(rules, schedule.look(), update),
            on_change=lambda update: log.info("%s is %s. %s", update.target, update.state, update.reason),
        )
        try:
            for outcome in await member.pull(
                pace=RateLimit(config.fleet_rate) if config.fleet_rate else None
            ):
                if outcome.error:
                    log.warning("%s: %s", outcome.assignment.slot, outcome.error)
            counts, told = self._answered.by_sha256, self._told
            news = {sha256: Served(*each) for sha256, each in counts.items() if told.get(sha256) != each}
            member.served(news)
            self._told = counts
            await member.tell()
        finally:
            member.close()


class _CrossingTrial:
    """A trial on the daemon's event loop, awaited on another."""

    def __init__(self, pool: ModelPool, threads: int, loop: asyncio.AbstractEventLoop) -> None:
        from lichen.runtime.trial import PoolTrial

        self._trial, self._loop = PoolTrial(pool, threads=threads), loop

    async def answers(self, version: Installed, prompts: tuple[Prompt, ...]) -> list[Answer]:
        """See Trial."""
        return await self._cross(self._trial.answers(version, prompts))

    async def perplexity(self, version: Installed, text: str) -> float:
        """See Trial."""
        return await self._cross(self._trial.perplexity(version, text))

    async def _cross(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


def takes_updates(config: Config) -> bool:
    """Whether a daemon on this machine takes updates: it is in a fleet, may, and has what it needs."""
    wanted = config.fleet_updates and not config.offline
    return wanted and (config.home / "fleet" / "enrolment.json").is_file() and find_spec("tuf") is not None


@asynccontextmanager
async def updating(config: Config, pool: ModelPool) -> AsyncIterator[None]:
    """Inside, the daemon moves to new versions, and takes them where this machine is in a fleet."""
    mover = Mover(config, pool)
    moving = asyncio.ensure_future(mover.run())
    loop = asyncio.get_running_loop()
    taker = Taker(config, pool, loop, mover.answered) if takes_updates(config) else None
    try:
        if taker is not None:
            taker.start()
        yield
    finally:
        moving.cancel()
        if taker is not None:
            taker.stop()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
