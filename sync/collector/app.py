"""The collector over HTTP (aiohttp): devices post what is signed, people read what a token opens.

    POST /v1/devices            join                    signed by the device's key, with the bundle's token
    POST /v1/reports            report                  signed by the device's key
    GET  /                      the page                the reader's token, as the password of any user
    GET  /v1/status             the page as JSON        the reader's token (Bearer or as a password)
    GET  /v1/census?slot=SLOT   all that is known       the same
    GET  /health                nothing but that it is there

The event loop never touches SQLite: one thread does, one request after the other.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from lichen.errors import (
    ConfigError,
    LichenError,
    NotFound,
    PayloadTooLarge,
    RequestError,
    TimedOut,
    Unauthorized,
)
from lichen.sync.collector.board import Board, Census, board
from lichen.sync.collector.desk import Desk
from lichen.sync.collector.page import HEADERS, page
from lichen.sync.reporting.wire import BODY_LIMIT, SIGNATURE
from lichen.sync.rollout import Policy

if TYPE_CHECKING:
    import ssl

BODY_S = 20.0  # seconds that a body may take
BOARD_S = 5.0  # seconds that a counted board is shown again, so that many readers cost one count
BOARDS = 64  # slots on the page

Result = TypeVar("Result")
Policies = Callable[[str], Awaitable[Policy | None]]
"""The rollout of a slot, if there is one that verifies."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The page as data. devices: by membership. Times: seconds since 1970."""

    fleet: str
    at: float
    devices: dict[str, int]
    dropped: int
    boards: tuple[Board, ...]


class CollectorApp:
    """Routes over a desk. reader: the token that reading needs. clock: seconds since 1970."""

    def __init__(
        self, desk: Desk, *, reader: str, policies: Policies, clock: Callable[[], float] = time.time
    ) -> None:
        self._desk, self._reader, self._policies, self._clock = desk, reader.encode(), policies, clock
        self._thread = ThreadPoolExecutor(1, "lichen-collector")
        self._shown: Status | None = None
        self._counting = asyncio.Lock()

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[_explained], client_max_size=BODY_LIMIT)
        app.add_routes(
            [
                web.post("/v1/devices", self.join),
                web.post("/v1/reports", self.take),
                web.get("/", self.show),
                web.get("/v1/status", self.status),
                web.get("/v1/census", self.census),
                web.get("/health", self.health),
            ]
        )
        return app

    async def join(self, request: web.Request) -> web.Response:
        """A device joins."""
        body, signature = await _read(request), request.headers.get(SIGNATURE, "")
        membership = await self._run(self._desk.join, body, signature, request.remote or "")
        return _json({"membership": membership})

    async def take(self, request: web.Request) -> web.Response:
        """A device reports."""
        body, signature = await _read(request), request.headers.get(SIGNATURE, "")
        return _json(await self._run(self._desk.take, body, signature, request.remote or ""))

    async def show(self, request: web.Request) -> web.Response:
        """The page."""
        self._check_reader(request)
        now = await self._status()
        members, waiting = now.devices.get("member", 0), now.devices.get("waiting", 0)
        text = page(now.fleet, now.boards, at=now.at, devices=members, waiting=waiting, dropped=now.dropped)
        return web.Response(text=text, content_type="text/html", headers=HEADERS)

    async def status(self, request: web.Request) -> web.Response:
        """The page as JSON."""
        self._check_reader(request)
        return _json(await self._status())

    async def census(self, request: web.Request) -> web.Response:
        """Devices and outcomes of one slot, for whoever decides about its rollout."""
        self._check_reader(request)
        slot = request.query.get("slot", "")
        if slot not in await self._run(self._desk.database.slots):
            raise NotFound(f"No device has reported on {slot[:160]!r}.")
        answer = _json(await self._run(self._census, slot))
        answer.enable_compression()
        return answer

    async def health(self, request: web.Request) -> web.Response:
        """That it is there."""
        return _json({"status": "ok"})

    def close(self) -> None:
        """End the thread and close the file."""
        self._thread.submit(self._desk.database.close)
        self._thread.shutdown()

    async def _run(self, act: Callable[..., Result], *given: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act, *given)

    def _census(self, slot: str) -> Census:
        database = self._desk.database
        return Census(
            slot=slot,
            at=self._clock(),
            members=tuple(database.members()),
            reported=tuple(database.reported(slot)),
        )

    async def _status(self) -> Status:
        """Count everything, or what was counted a moment ago."""
        async with self._counting:
            if self._shown is None or not 0 <= self._clock() - self._shown.at < BOARD_S:
                slots = (await self._run(self._desk.database.slots))[:BOARDS]
                policies = {slot: await self._policies(slot) for slot in slots}
                self._shown = await self._run(self._count, policies)
            return self._shown

    def _count(self, policies: dict[str, Policy | None]) -> Status:
        members = self._desk.database.members()
        counted = {"member": 0, "waiting": 0, "expelled": 0}
        for each in members:
            counted[each.membership] += 1
        return Status(
            fleet=self._desk.fleet,
            at=self._clock(),
            devices=counted,
            dropped=sum(each.dropped for each in members),
            boards=tuple(board(self._census(slot), policy) for slot, policy in policies.items()),
        )

    def _check_reader(self, request: web.Request) -> None:
        """Raises Unauthorized unless the reader's token came, as a Bearer or as the password of Basic."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError, ValueError):
                given = ""
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(given.encode(), self._reader):
            raise Unauthorized("Reading needs the reader's token.", hint="It is in the collector's folder.")


@asynccontextmanager
async def listening(
    app: CollectorApp, host: str, port: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Listen inside the block, which gets the URL. port 0 takes a free one. Raises ConfigError."""
    runner = web.AppRunner(
        app.application(), access_log=None, keepalive_timeout=30, lingering_time=2, shutdown_timeout=5
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls, reuse_address=True).start()
        except OSError as error:
            raise ConfigError(f"The collector cannot listen on {host}:{port}: {error.strerror}.") from error
        shown = f"[{host}]" if ":" in host else host
        yield f"{'https' if tls else 'http'}://{shown}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
        app.close()


async def _read(request: web.Request) -> bytes:
    """The body, within its size and time; packed bodies are not taken."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("A body must not be packed.")
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise PayloadTooLarge(f"A body may have {BODY_LIMIT:,} bytes.") from error
    except TimeoutError as error:
        raise TimedOut(f"The body did not arrive within {BODY_S:g} s.") from error


def _json(value: Any) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )


@web.middleware
async def _explained(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors as one sentence in JSON; those that are not meant tell nothing of the machine."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        status, code, sentence = error.status, "http_error", f"{error.reason}."
    except LichenError as error:
        status, code = error.status, error.code
        sentence = str(error) if status < 500 or status == 503 else "The collector could not do it."
    answer = _json({"error": {"code": code, "message": sentence}})
    answer.set_status(status)
    if status == 401:
        answer.headers["WWW-Authenticate"] = 'Basic realm="lichen fleet", charset="UTF-8"'
    return answer
