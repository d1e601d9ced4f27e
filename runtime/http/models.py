"""lichen's own routes for models in memory: load one before it is needed, and unload it again.

Of a model with an adapter (MODEL:ADAPTER) they pin and unload the adapter; its model stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from aiohttp import web

from lichen.errors import LichenError
from lichen.runtime.http.guard import error_body
from lichen.runtime.http.openai import json_response
from lichen.runtime.http.schema import KeepAlive, parse
from lichen.runtime.resident import ModelStatus
from lichen.runtime.variants import Variants

encode = msgspec.json.encode


class LoadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /models/load`. pin: it stays until it is unloaded. keep_alive in seconds, -1 for ever."""

    model: str | None = None
    pin: bool | None = None
    keep_alive: KeepAlive | None = None
    stream: bool = False


class UnloadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /models/unload`."""

    model: str


class ModelRoutes:
    """The handlers. check: raises while the daemon takes no requests."""

    def __init__(self, models: Variants, check: Callable[[], None]) -> None:
        self._models = models
        self._check = check

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [web.post("/models/load", self.load), web.post("/models/unload", self.unload)]

    async def load(self, request: web.Request) -> web.StreamResponse:
        """Load a model; with `stream` one JSON line for each step of progress."""
        body = parse(await request.read(), LoadBody)
        self._check()
        if not body.stream:
            status = await self._models.load(body.model, pin=body.pin, keep_alive=body.keep_alive)
            return json_response(_ready(status))
        response = web.StreamResponse(
            headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        try:
            async for line in self._steps(body):
                await response.write(encode(line) + b"\n")
        except ConnectionError:  # the client is gone; a load that nobody else wants was given up
            return response
        await response.write_eof()
        return response

    async def unload(self, request: web.Request) -> web.Response:
        """Unload a model once it is idle."""
        body = parse(await request.read(), UnloadBody)
        freed = await self._models.unload(body.model)
        return json_response({"status": "unloaded", "model": body.model, "freed_bytes": freed})

    async def _steps(self, body: LoadBody) -> AsyncIterator[dict[str, Any]]:
        steps: asyncio.Queue[float | None] = asyncio.Queue()
        load = asyncio.ensure_future(
            self._models.load(body.model, pin=body.pin, keep_alive=body.keep_alive, progress=steps.put_nowait)
        )
        load.add_done_callback(lambda _: steps.put_nowait(None))
        last = -1.0
        try:
            while (step := await steps.get()) is not None:
                if step != last:
                    last = step
                    yield {"status": "loading", "progress": round(step, 3)}
            yield _ready(load.result())
        except LichenError as error:
            yield error_body(error)
        finally:
            load.cancel()


def _ready(status: ModelStatus) -> dict[str, Any]:
    return {"status": status.state, "model": msgspec.to_builtins(status)}
