"""One server process: started, waited for, watched and stopped. Never two at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.peer import BenchError, Peer, Settings, environment
from bench.stream import HOST, StreamError, exchange, parse_response, request_bytes

READY_LIMIT_S = 120.0
STOP_LIMIT_S = 10.0
WATCH_EVERY_S = 0.2


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def run_to_end(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, in which SIGTERM unwinds as Ctrl-C does: no server outlives its benchmark."""

    async def guarded() -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio.run makes a task"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await main

    try:
        asyncio.run(guarded())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None


@dataclass(slots=True)
class Server:
    """A running server. spawned: monotonic seconds. ready_s: from the spawn to its first healthy answer."""

    peer: Peer
    settings: Settings
    process: subprocess.Popen[bytes]
    log: Path
    spawned: float
    ready_s: float = 0.0

    def tail(self, characters: int = 400) -> str:
        """The end of what it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:].strip()

    def check_alive(self) -> None:
        """Raise BenchError with its last words when it is gone."""
        code = self.process.poll()
        if code is not None:
            raise BenchError(f"{self.peer.title} ended with exit code {code}: {self.tail()}")

    async def wait_ready(self, every: float = 0.02) -> None:
        """Ask for its health until it answers 200. Raises BenchError when it ends or takes too long."""
        request = request_bytes(self.settings.port, self.peer.health)
        deadline = self.spawned + READY_LIMIT_S
        while time.monotonic() < deadline:
            self.check_alive()
            record = await exchange(self.settings.port, request, timeout=5)
            with suppress(StreamError):
                if record.error is None and parse_response(record.arrivals).status == 200:
                    self.ready_s = record.finished - self.spawned
                    return
            await asyncio.sleep(every)
        raise BenchError(f"{self.peer.title} was not ready within {READY_LIMIT_S:g} s: {self.tail()}")


@asynccontextmanager
async def running(
    peer: Peer, settings: Settings, *, python_flags: Sequence[str] = (), probe_every: float = 0.02
) -> AsyncIterator[Server]:
    """The server, ready; stopped on leaving. Raises BenchError when it does not come up."""
    python, *arguments = peer.command(settings)
    with tempfile.TemporaryDirectory(prefix="lichen-bench-") as folder:
        log = Path(folder) / "server.log"
        settings_file = Path(folder) / "config.toml"
        settings_file.touch()  # lichen then reads no settings of whoever runs the benchmark
        with log.open("wb") as output:
            spawned = time.monotonic()
            process = subprocess.Popen(  # noqa: ASYNC220 - a fork of milliseconds, and nothing else runs yet
                [python, *python_flags, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment(), "LICHEN_CONFIG": str(settings_file)},
                start_new_session=True,
            )
        server = Server(peer, settings, process, log, spawned)
        try:
            await server.wait_ready(probe_every)
            yield server
        finally:
            await asyncio.to_thread(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL to the whole group when that does not help in time."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class MemoryWatch:
    """Peak resident memory (bytes) of a process and its children, looked at five times a second.

    Pages that two processes share count twice; every server measured here is a single process.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._task: asyncio.Task[None] | None = None
        self.peak = 0

    async def __aenter__(self) -> MemoryWatch:
        self._look()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._look()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            self._look()

    def _look(self) -> None:
        total = 0
        with suppress(psutil.NoSuchProcess):
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        self.peak = max(self.peak, total)


class ProcessorWatch:
    """Processor time between entering and leaving: the servers', the benchmark's, and everybody else's.

    Another busy process makes a server several times slower (its threads wait for each other at every
    step), so a number without the last of the three cannot be trusted.
    """

    def __init__(self, *pids: int) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self.server_cores = self.client_cores = self.foreign_cores = 0.0

    def __enter__(self) -> ProcessorWatch:
        self._before = self._look()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, server, client = (
            after - before for after, before in zip(self._look(), self._before, strict=True)
        )
        self.server_cores = server / wall
        self.client_cores = client / wall
        self.foreign_cores = max(0.0, (busy - server - client) / wall)

    def _look(self) -> tuple[float, float, float, float]:
        """Seconds: of the clock, of all processors' work, of the servers', of this process's."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        server = 0.0
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                own = process.cpu_times()
                server += own.user + own.system
        return time.monotonic(), busy, server, time.process_time()
