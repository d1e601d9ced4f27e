"""A daemon without a model but with routes that misbehave, and clients that do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from lichen.runtime.http.daemon import Daemon, DaemonOptions
from tests.conftest import empty_pool

SECRET_PATH = "/home/ann/.config/lichen/token.txt"


class Misbehaving(Daemon):
    """Routes that fail, hang, echo and flood; `ended` says how a handler came to its end."""

    def __init__(self, options: DaemonOptions) -> None:
        super().__init__(options, empty_pool())
        self.ended: list[str] = []
        self.flooded = 0  # bytes handed to the connection

    def application(self) -> web.Application:
        app = super().application()
        app.router.add_get("/boom", self.boom)
        app.router.add_get("/hang", self.hang)
        app.router.add_get("/stream", self.stream)
        app.router.add_get("/flood", self.flood)
        app.router.add_post("/echo", self.echo)
        return app

    async def boom(self, request: web.Request) -> web.Response:
        raise RuntimeError(f"cannot read {SECRET_PATH} with lk-0123456789abcdef")

    async def hang(self, request: web.Request) -> web.Response:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        return web.Response()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        if "fail" in request.query:
            raise RuntimeError(SECRET_PATH)
        return await self.hang(request)

    async def flood(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65_536)
                self.flooded += 65_536
        except (ConnectionError, asyncio.CancelledError):
            self.ended.append("cut")
            raise

    async def echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read())


@asynccontextmanager
async def misbehaving(**options: Any) -> AsyncIterator[Misbehaving]:
    """One of them, listening on a free port."""
    daemon = Misbehaving(DaemonOptions(port=0, **options))
    async with daemon.listening():
        yield daemon


def address(daemon: Daemon) -> tuple[str, int]:
    """Host and port."""
    host, _, port = daemon.url.partition("://")[2].partition(":")
    return host, int(port)


async def drip(daemon: Daemon, head: bytes, then: bytes, seconds: float) -> bytes:
    """Send `head`, then `then` byte by byte, ten a second, until cut; what came back."""
    reader, writer = await asyncio.open_connection(*address(daemon))
    answer = asyncio.ensure_future(_until_cut(reader))
    writer.write(head)
    try:
        async with asyncio.timeout(seconds):
            for byte in then:
                writer.write(bytes([byte]))
                await asyncio.wait({answer}, timeout=0.1)
                if answer.done():
                    break
            return await answer
    finally:
        answer.cancel()
        writer.transport.abort()


async def _until_cut(reader: asyncio.StreamReader) -> bytes:
    """What comes before the end; a reset is an end too: it comes where the last byte met a closed socket."""
    came = b""
    try:
        while data := await reader.read(65_536):
            came += data
    except ConnectionResetError:
        pass
    return came


async def stall(daemon: Daemon, path: str) -> socket.socket:
    """A client that asks for `path` and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, address(daemon))
    await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client
