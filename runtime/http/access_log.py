"""The request log: one line a request to the logger `lichen.access`, and an id that client and log share.

A line holds method, path, status, milliseconds, bytes sent, key id, the adapter that answered (its digest
and scale) and request id. It never holds what was asked or answered, a query string, or a key.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from lichen.runtime.adaptation import Adaptation
from lichen.runtime.http.log_format import EXCHANGE, Exchange

HEADER = "X-Request-Id"
CLIENT_LEFT = 499  # as nginx writes it: the client closed the connection before its answer was complete
PATH_LIMIT = 200  # characters
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("lichen.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: gives the request its id, and logs one whose client left."""
    exchange = Exchange(_request_id(request.headers.get(HEADER, "")))
    EXCHANGE.set(exchange)
    try:
        return await handler(request)
    except asyncio.CancelledError:
        if log.isEnabledFor(logging.INFO):
            sent = 0 if exchange.response is None else exchange.response.body_length
            _write(request, CLIENT_LEFT, time.monotonic() - exchange.started, sent)
        raise


async def name_request(_request: web.Request, response: web.StreamResponse) -> None:
    """aiohttp `on_response_prepare` signal: the answer carries the id and is known from here on."""
    exchange = EXCHANGE.get()
    if exchange is not None:
        exchange.response = response
        response.headers[HEADER] = exchange.id


def log_adapter(adaptation: Adaptation) -> None:
    """The line of this request tells what it is answered with."""
    exchange = EXCHANGE.get()
    if exchange is not None and adaptation:
        exchange.adapter = f"{adaptation.digest}*{adaptation.scale:g}"


class AccessLog(AbstractAccessLogger):
    """aiohttp calls it once an answer is written, also for bytes that were no HTTP."""

    @property
    def enabled(self) -> bool:
        """Whether lines are wanted; aiohttp asks once a connection."""
        return log.isEnabledFor(logging.INFO)

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Write the line. time: seconds that the request took."""
        _write(request, response.status, time, response.body_length)


def _request_id(given: str) -> str:
    return given if _SANE_ID.fullmatch(given) else secrets.token_hex(16)


def _write(request: web.BaseRequest, status: int, seconds: float, sent: int) -> None:
    exchange = EXCHANGE.get()
    path = request.rel_url.raw_path  # percent-encoded, so that a path cannot forge a line; without the query
    fields = {
        "method": request.method,
        "path": path if len(path) <= PATH_LIMIT else path[:PATH_LIMIT] + "...",
        "status": status,
        "ms": round(seconds * 1e3, 1),
        "bytes": sent,
        "key": "-" if exchange is None else exchange.key,
        "adapter": "-" if exchange is None else exchange.adapter,
    }
    number = "-" if exchange is None else exchange.id
    log.info(
        "%(method)s %(path)s %(status)d %(ms).1fms %(bytes)dB key=%(key)s adapter=%(adapter)s "
        "request=%(request)s",
        {**fields, "request": number},
        extra={"fields": fields},
    )
