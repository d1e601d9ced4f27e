"""A stand-in for the daemon: aiohttp in a thread, with answers that a test chooses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web


class StandIn:
    """`answer` is what a chat gives: "whole", "cut", "abort", "garbage", "escape", "error" or "endless".

    `bodies` are the requests; `cancelled` is set when a client leaves an endless answer.
    """

    def __init__(self) -> None:
        self.port = 0
        self.answer = "whole"
        self.bodies: list[dict[str, object]] = []
        self.cancelled = threading.Event()

    def application(self) -> web.Application:
        """The routes that the command line uses."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}, {"id": "other"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(
            b": prefill 1/2\n\n" + event("\x1b]0;owned\x07" if self.answer == "escape" else "one ")
        )
        if self.answer == "abort":
            assert request.transport is not None
            request.transport.abort()
        elif self.answer == "garbage":
            await response.write(b"data: {not json\n\n")
        elif self.answer == "error":
            await response.write(b'data: {"error": {"message": "The engine failed."}}\n\n')
        elif self.answer == "endless":
            await self._write_for_ever(response)
        elif self.answer in ("whole", "escape"):
            await response.write(event("two", "stop") + b"data: [DONE]\n\n")
        return response

    async def _write_for_ever(self, response: web.StreamResponse) -> None:
        try:
            while True:
                await response.write(event("more "))
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.CancelledError):
            self.cancelled.set()
            raise


def event(text: str, reason: str | None = None) -> bytes:
    """One server-sent event of a chat answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"model": "m", "choices": [choice]}).encode() + b"\n\n"


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """A stand-in that listens on a free port."""
    stand_in = StandIn()
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(stand_in.application(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stand_in.port = int(runner.addresses[0][1])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield stand_in
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
