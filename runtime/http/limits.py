"""Limits on what one client may take: requests a minute, time for its body, for its answer, and to read it.

What aiohttp's own settings bound is set in `server_limits`: headers, idle connections, lingering. The body
is bounded by `read_body`, the answer by `Deadlines`, and a client that does not read by `cut_stalled`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from lichen.errors import RateLimited, RequestError, TimedOut

MAX_BUCKETS = 10_000  # clients that are remembered; the one unseen for longest is forgotten first
SWEEPS = 4  # looks at each connection within the time that it may stall
LINGERING = 10.0  # seconds that a refused body is read and dropped, so that the client sees the refusal

UPLOAD_PATH = "/v1/files"  # the one body that is not read as a whole
UPLOAD_RATE = 64 << 10  # bytes a second that an upload must have on average after the first seconds

log = logging.getLogger("lichen.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RateLimiter:
    """A token bucket a client. It holds one minute's requests: so many at once, then a steady trickle.

    per_minute: 0 is no limit. clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, when)

    def take(self, client: str) -> None:
        """Count one request. Raises RateLimited when the client has none left."""
        if not self._capacity:
            return
        now = self._clock()
        tokens, when = self._buckets.pop(client, (float(self._capacity), now))
        tokens = min(float(self._capacity), tokens + (now - when) * self._capacity / 60)
        enough = tokens >= 1
        self._buckets[client] = (tokens - 1 if enough else tokens, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if not enough:
            raise RateLimited(
                f"More than {self._capacity} requests a minute came from this client.",
                retry_after=max(1, math.ceil((1 - tokens) * 60 / self._capacity)),
            )


class Deadlines:
    """Seconds that a request gets: for its body to arrive, and in total to be answered (0: no limit)."""

    def __init__(self, *, read: float, answer: float) -> None:
        self._read = read
        self._answer = answer

    @property
    def middleware(self) -> Middleware:
        """Stands inside the guard, which turns its errors into answers and keeps strangers out."""

        @web.middleware
        async def limited(request: web.Request, handler: Handler) -> web.StreamResponse:
            arrives = request.can_read_body and request.match_info.http_exception is None
            if arrives and not is_upload(request):
                await read_body(request, self._read)
            timer = asyncio.timeout(self._answer or None)
            try:
                async with timer:
                    return await handler(request)
            except TimeoutError as error:
                if not timer.expired():
                    raise
                raise TimedOut(
                    f"The request was not answered within {self._answer:g} seconds.",
                    hint="Ask for fewer tokens, or see --request-timeout.",
                ) from error

        return limited


async def read_body(request: web.Request, limit_s: float) -> bytes:
    """The whole body; aiohttp keeps it, so that the handler's own `request.read()` costs nothing.

    Raises a RequestError with status 408 when it did not arrive within limit_s seconds, a RequestError when
    it broke off or cannot be unpacked, and aiohttp's HTTPRequestEntityTooLarge.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await request.read()
    except TimeoutError as error:
        raise _SlowBody(
            f"The body did not arrive within {limit_s:g} seconds.", hint="See --read-timeout."
        ) from error
    except web.RequestPayloadError as error:
        raise RequestError("The body broke off, or is not encoded as its headers say.") from error


def is_upload(request: web.Request) -> bool:
    """Whether a body is a file that its route reads piece by piece.

    Only with a header that a browser's form cannot send, so that no web page can upload in passing.
    """
    return (
        request.method == "POST"
        and request.path == UPLOAD_PATH
        and request.content_type == "multipart/form-data"
        and ("Authorization" in request.headers or "X-Api-Key" in request.headers)
    )


@asynccontextmanager
async def arriving(limit_s: float) -> AsyncIterator[Callable[[int], None]]:
    """Bound an upload's time: limit_s seconds, and more as bytes arrive; tell what it yields their number.

    Raises what `read_body` raises.
    """
    timer = asyncio.timeout(limit_s)
    loop = asyncio.get_running_loop()
    started, received = loop.time(), 0

    def more(count: int) -> None:
        nonlocal received
        received += count
        timer.reschedule(started + limit_s + received / UPLOAD_RATE)

    try:
        async with timer:
            yield more
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise _SlowBody("The file arrived too slowly.", hint="See --read-timeout.") from error
    except web.RequestPayloadError as error:
        raise RequestError("The body broke off, or is not encoded as its headers say.") from error


async def cut_stalled(server: web.Server, limit_s: float) -> None:
    """Watch a server's connections for ever: cut one whose client has stopped reading for limit_s seconds.

    A connection stands still while its buffer is over the high-water mark and none of it leaves, or while it
    closes with bytes unsent. Its handler waits meanwhile, so what one client holds in memory is bounded.
    One task for all connections costs a token nothing, which a timer around every write would.

    Not covered: a client that reads a little now and then; `Deadlines` ends its request.
    """
    loop = asyncio.get_running_loop()
    open_now: dict[web.RequestHandler, asyncio.Transport] = {}
    standing: dict[asyncio.Transport, tuple[object, float]] = {}  # how it stands, and since when
    while True:
        await asyncio.sleep(limit_s / SWEEPS)
        now = loop.time()
        # A handler forgets its transport when it closes it, with bytes still unsent.
        open_now = {
            handler: transport
            for handler in server.connections
            if (transport := handler.transport or open_now.get(handler)) is not None
        }
        before, standing = standing, {}
        for handler, transport in open_now.items():
            unsent = transport.get_write_buffer_size()
            closing = transport.is_closing()
            if not unsent or not (closing or handler.writing_paused):
                continue
            how = "closing" if closing else unsent
            then, since = before.get(transport, (how, now))
            standing[transport] = (how, since if how == then else now)
            if now - standing[transport][1] >= limit_s * (1 - 1 / SWEEPS):
                log.info("A client stopped reading its answer; its connection was cut.")
                transport.abort()  # the handler is cancelled, and its generation with it


def server_limits(read_timeout: float) -> dict[str, Any]:
    """aiohttp's own limits, as arguments of `web.AppRunner`.

    keepalive_timeout also bounds how long the headers of a request may take: aiohttp counts from the
    connection's beginning, or from the end of its last answer, until they are complete.
    """
    return {"keepalive_timeout": read_timeout, "lingering_time": min(LINGERING, read_timeout)}


class _SlowBody(RequestError):
    """HTTP's own 408; nothing outside this file raises it."""

    status = 408
    code = "request_timeout"
