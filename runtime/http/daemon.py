"""The daemon: sockets, routes, loading, draining. One event loop, which never computes.

It listens before the model is there, so that `/health` can say "loading". SIGTERM, or a first SIGINT,
drains: no new requests, the running ones may finish until the deadline. A second SIGINT stops at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
from aiohttp import web

import lichen
from lichen.adapters.files import FileStore
from lichen.adapters.gate import Limits
from lichen.adapters.jobs import JobStore
from lichen.adapters.registry import Registry
from lichen.adapters.thread import JournalThread
from lichen.errors import ConfigError, LichenError, Unavailable
from lichen.runtime import memory, native
from lichen.runtime.http.access_log import AccessLog, name_request, traced
from lichen.runtime.http.daemon_learning import DaemonLearning
from lichen.runtime.http.feedback import FeedbackRoutes
from lichen.runtime.http.files import FileRoutes
from lichen.runtime.http.fine_tuning import FineTuningRoutes
from lichen.runtime.http.guard import LOOPBACK, Guard
from lichen.runtime.http.keeping import Keeping, Policy
from lichen.runtime.http.keys import KeyStore
from lichen.runtime.http.limits import Deadlines, RateLimiter, cut_stalled, server_limits
from lichen.runtime.http.metrics_route import MetricsRoute
from lichen.runtime.http.models import ModelRoutes
from lichen.runtime.http.ollama import OllamaRoutes
from lichen.runtime.http.ollama_models import OllamaModels
from lichen.runtime.http.open_files import raise_limit
from lichen.runtime.http.openai import OpenAIRoutes, json_response
from lichen.runtime.http.stops import signals
from lichen.runtime.http.tls import server_context
from lichen.runtime.http.tokens import TokenRoutes
from lichen.runtime.initiative import Options as InitiativeOptions
from lichen.runtime.lives import Lives
from lichen.runtime.metrics import ProcessMetrics
from lichen.runtime.pool import ModelPool
from lichen.runtime.probation import Probation
from lichen.runtime.served_model import ServedModel
from lichen.runtime.variants import Catalogue, Variants
from lichen.sync.store import Store

log = logging.getLogger("lichen.http")


class DaemonOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where and for whom to listen. port 0 takes a free one; max_body in bytes; timeouts in seconds.

    rate_limit: requests a minute and client, 0 for no limit; a request_timeout of 0 is no limit either.
    journal: what is kept of answers, under learning_folder; its limits in bytes. adapters_folder: of the
    registry whose adapters are served; None for none. initiative: whether it learns by itself. auto_rollback:
    whether a version with which a bad turn came goes back by itself.
    """

    host: str = "127.0.0.1"
    port: int = 8642
    uds: Path | None = None
    api_key: str | None = None
    insecure_bind: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    keys_file: Path | None = None
    rate_limit: int = 0
    request_timeout: float = 600.0
    read_timeout: float = 30.0
    write_timeout: float = 60.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_body: int = 8 << 20
    drain_timeout: float = 30.0
    journal: Policy = "off"
    learning_folder: Path | None = None
    journal_limit: int = 1_000_000_000
    files_limit: int = 2_000_000_000
    adapters_folder: Path | None = None
    gate: Limits = Limits()
    initiative: InitiativeOptions = InitiativeOptions()
    auto_rollback: bool = True

    def check(self) -> None:
        """Raise ConfigError rather than listen to a network without a key, or with keys nobody can read."""
        if self.keys_file is not None and KeyStore(self.keys_file).any():
            return
        if self.uds is not None or self.api_key is not None or self.insecure_bind or _is_loopback(self.host):
            return
        raise ConfigError(
            f"Listening on {self.host} lets its whole network use this model, and no API key is set.",
            hint="Make one: lichen keys create NAME. Or set LICHEN_API_KEY, or say --allow-unauthenticated.",
        )


class Daemon:
    """State of one daemon: its models, and whether it takes requests."""

    def __init__(self, options: DaemonOptions, pool: ModelPool, store: Store | None = None) -> None:
        options.check()
        self.options = options
        self.pool = pool
        folder = options.adapters_folder
        self.registry = None if folder is None else Registry(folder)
        lives = None if folder is None else Lives(folder)
        self.models = Variants(pool, None if self.registry is None else Catalogue(self.registry, lives))
        self._store = store
        self.state: Literal["loading", "ok", "draining", "failed"] = "loading"
        self.url = ""
        self._failure: LichenError | None = None
        self._started = time.monotonic()
        self.metrics = ProcessMetrics()
        pool.on_ready, pool.on_evicted = self.metrics.loaded, self.metrics.evicted
        self.journal: JournalThread | None = None
        self._files: FileStore | None = None
        self.learning: DaemonLearning | None = None
        if options.journal != "off" and options.learning_folder is not None:
            folder = options.learning_folder
            self.journal = JournalThread(folder / "journal.db", limit=options.journal_limit)
            self._files = FileStore(folder / "files", limit=options.files_limit)
            if self.registry is not None:
                jobs = JobStore(folder / "jobs")
                self.learning = DaemonLearning(
                    pool, jobs, self._files, self.registry, self.journal, options.gate, options.initiative
                )
        self._probation: Probation | None = None
        if self.registry is not None and lives is not None:
            self._probation = Probation(self.registry, lives, self.journal, auto=options.auto_rollback)
        self._tls = server_context(options.tls_cert, options.tls_key)
        self._guard = Guard(
            hosts=(options.host, *options.allowed_hosts),
            origins=options.allowed_origins,
            api_key=options.api_key,
            keys=None if options.keys_file is None else KeyStore(options.keys_file),
            rate=RateLimiter(options.rate_limit),
        )

    def check(self) -> None:
        """Raise Unavailable, or why the start failed, while no requests are taken."""
        if self.state == "draining":
            raise Unavailable("lichen is shutting down and takes no new requests.")
        if self._failure is not None:
            raise self._failure
        if self.state == "loading":
            raise Unavailable("The model is still loading.", hint="Try again in a moment.")

    @asynccontextmanager
    async def use(self, name: str | None, keep_alive: float | None) -> AsyncIterator[ServedModel]:
        """A model by name, loaded if need be, held until the end of the block. Raises LichenError."""
        self.check()
        async with self.models.use(name, keep_alive) as model:
            yield model

    def application(self) -> web.Application:
        """The aiohttp application with every route."""
        deadlines = Deadlines(read=self.options.read_timeout, answer=self.options.request_timeout)
        app = web.Application(
            middlewares=[traced, self._guard.middleware, deadlines.middleware],
            client_max_size=self.options.max_body,
        )
        learning = None if self.learning is None else self.learning.jobs
        metrics = MetricsRoute(self.pool.ready, self.metrics, memory.resident, self._journal_bytes, learning)
        keeping = Keeping(self.options.journal, self.journal, self.metrics)
        app.on_response_prepare.extend([name_request, self._guard.allow_reading, metrics.count_error])
        app.add_routes(metrics.routes())
        app.add_routes(OpenAIRoutes(self.use, self.models.known, self.pool.loaded, keeping).routes())
        timeout, registry = self.options.read_timeout, self.registry
        app.add_routes(FeedbackRoutes(self.journal, self.metrics, registry).routes())
        app.add_routes(FileRoutes(self._files, self.journal, timeout, registry).routes())
        app.add_routes(FineTuningRoutes(self.learning, self._files).routes())
        app.add_routes(TokenRoutes(self.use).routes())
        app.add_routes(ModelRoutes(self.models, self.check).routes())
        app.add_routes(OllamaRoutes(self.use, self.models).routes())
        app.add_routes(OllamaModels(self.models, self._store).routes())
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/status", self.status),
                web.get("/openapi.json", self.openapi),
            ]
        )
        return app

    def _journal_bytes(self) -> int:
        return 0 if self.journal is None else self.journal.size_on_disk()

    async def load(self, first: Awaitable[None]) -> None:
        """Wait for the default model; a failure is kept for `/health` and raised."""
        try:
            await first
        except LichenError as error:
            self.state, self._failure = "failed", error
            raise
        if self.state == "loading":
            self.state = "ok"

    async def health(self, request: web.Request) -> web.Response:
        """200 when requests are answered, 503 otherwise, with the state."""
        state: str = self.state
        default = self.pool.served()
        if default is not None and default.engine.state == "failed":
            state = "failed"
        return json_response({"status": state}, status=200 if state == "ok" else 503)

    async def version(self, request: web.Request) -> web.Response:
        """Versions of lichen and of the llama.cpp bindings."""
        return json_response({"version": lichen.__version__, "llama_cpp": native.version()})

    async def status(self, request: web.Request) -> web.Response:
        """What runs now: memory (bytes), and for each model its state, slots, queue and counters.

        `slots`, `queue`, `kv` and `counters` beside `models` are sums over the models that are loaded.
        """
        models = self.pool.loaded()
        body: dict[str, Any] = {
            "version": lichen.__version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "state": self.state,
            "rss_bytes": memory.resident(),
            "available_bytes": memory.available(self.pool.options.memory_limit),
            "tasks": len(asyncio.all_tasks()),
            "models": msgspec.to_builtins(models),
            "plan": msgspec.to_builtins(self.pool.plan),
        }
        for part in ("slots", "queue", "kv", "counters"):
            sums: dict[str, float] = {}
            for numbers in (getattr(model, part) for model in models):
                for name, number in numbers.items():
                    sums[name] = sums.get(name, 0) + number
            body[part] = sums
        return json_response(body)

    async def openapi(self, request: web.Request) -> web.Response:
        """The OpenAPI document of these routes."""
        return web.Response(body=await asyncio.to_thread(_openapi_bytes), content_type="application/json")

    async def drain(self) -> bool:
        """Refuse new requests and let running ones finish until the deadline; True when all did."""
        self.state = "draining"
        return await self.pool.drain(self.options.drain_timeout)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Sockets open inside; `url` says where."""
        runner = web.AppRunner(
            self.application(),
            handler_cancellation=True,
            access_log_class=AccessLog,
            shutdown_timeout=1.0,
            **server_limits(self.options.read_timeout),
        )
        await runner.setup()
        assert runner.server is not None, "setup() makes the server"
        watch = asyncio.ensure_future(cut_stalled(runner.server, self.options.write_timeout))
        tasks = [asyncio.ensure_future(one.run()) for one in (self.learning, self._probation) if one]
        try:
            await self._open(runner)
            yield
        finally:
            watch.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await runner.cleanup()
            if self.journal is not None:
                await self.journal.close()
            if self.options.uds is not None:
                self.options.uds.unlink(missing_ok=True)

    async def _open(self, runner: web.AppRunner) -> None:
        options = self.options
        if options.uds is not None:
            _remove_stale_socket(options.uds)
            options.uds.parent.mkdir(parents=True, exist_ok=True)
            await web.UnixSite(runner, str(options.uds)).start()
            options.uds.chmod(0o600)
            self.url = f"unix:{options.uds}"
            return
        site = web.TCPSite(runner, options.host, options.port, ssl_context=self._tls)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"lichen cannot listen on {options.host}:{options.port}: {os.strerror(error.errno or 0)}.",
                hint="Is another lichen running? Choose another port with --port.",
            ) from error
        port = runner.addresses[0][1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.url = f"{'http' if self._tls is None else 'https'}://{host}:{port}"


async def serve(
    options: DaemonOptions,
    pool: ModelPool,
    first: Awaitable[None],
    *,
    store: Store | None = None,
    on_event: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run a daemon until a signal ends it; closes the pool. `on_event` gets lines for a person.

    first: done when the default model is ready (`ModelPool.start`). store: where clients may pull models to.
    Raises ConfigError when it cannot listen, and what loading raised.
    """
    raise_limit()
    try:
        daemon = Daemon(options, pool, store)
        async with daemon.listening():
            on_event(f"Listening on {daemon.url}")
            stop = signals(on_event)
            load = asyncio.ensure_future(daemon.load(first))
            stopped = asyncio.ensure_future(stop.wait_first())
            await asyncio.wait({load, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if load.done():
                load.result()
                _announce(pool, on_event)
            await stopped
            drained = asyncio.ensure_future(daemon.drain())
            await asyncio.wait(
                {drained, asyncio.ensure_future(stop.wait_second())}, return_when=asyncio.FIRST_COMPLETED
            )
            with suppress(LichenError):
                await load
    finally:
        await pool.close()
    on_event("Stopped.")


def _announce(pool: ModelPool, on_event: Callable[[str], None]) -> None:
    for status in pool.loaded():
        on_event(f"Ready: {status.name}" + (f" ({status.note})" if status.note else ""))


def _is_loopback(host: str) -> bool:
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _remove_stale_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on; refuse to take a live one or another file."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if not path.is_socket():
            raise ConfigError(f"{path} exists and is not a socket.", hint="Choose another path with --uds.")
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"Another program listens on {path}.", hint="Choose another path with --uds.")


def _openapi_bytes() -> bytes:
    from lichen.runtime.http.openapi import document_bytes

    return document_bytes()
