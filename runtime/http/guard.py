"""What every request passes before a route sees it: errors made readable, Host, Origin, API key.

A daemon on localhost can be reached by any web page: through DNS rebinding (a foreign Host header) or a
cross-origin request (a foreign Origin header). Both are refused from the first byte on.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from lichen.errors import Forbidden, LichenError, NotFound, PayloadTooLarge, RequestError, Unauthorized

log = logging.getLogger("lichen.http")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health", "/version"})  # need no API key, so that a supervisor can ask

ERROR_CODE: web.ResponseKey[str] = web.ResponseKey("lichen_error_code", str)  # why an answer is an error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guard:
    """aiohttp middlewares of one daemon.

    hosts: names that may stand in the Host header, besides loopback; "*" allows any.
    origins: web origins that may call from a browser, besides loopback pages; "*" allows any.
    """

    def __init__(self, *, hosts: Iterable[str], origins: Iterable[str], api_key: str | None) -> None:
        self._hosts = LOOPBACK | {host.lower() for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._api_key = None if api_key is None else api_key.encode()

    def check(self, request: web.Request) -> None:
        """Raise Forbidden or Unauthorized for a request that must not be answered."""
        self._check_host(request)
        self._check_origin(request)
        if self._api_key is not None and request.path not in OPEN_PATHS and request.method != "OPTIONS":
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            given = key.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._api_key):
                raise Unauthorized(
                    "This daemon needs an API key.", hint="Send the header: Authorization: Bearer KEY"
                )

    def _check_host(self, request: web.Request) -> None:
        if "*" in self._hosts or request.transport is None:
            return
        if isinstance(request.transport.get_extra_info("sockname"), str):  # a Unix socket: no browser
            return
        name = _host_name(request.headers.get("Host", ""))
        if name not in self._hosts:
            raise Forbidden(
                f"This daemon does not answer to the host name {name!r}.",
                hint="Start it with --allowed-host NAME if it should.",
            )

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        if origin is None:
            if request.headers.get("Sec-Fetch-Site") == "cross-site":
                raise Forbidden("Another web site may not call this daemon.")
            return
        if not self.allows_origin(origin):
            raise Forbidden(
                f"Web pages of {origin} may not call this daemon.",
                hint="Start it with --allowed-origin ORIGIN if they should.",
            )

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may call: loopback pages, and those that were named."""
        origin = origin.lower()
        if origin in self._origins or "*" in self._origins:
            return True
        try:
            return urlsplit(origin).hostname in LOOPBACK
        except ValueError:
            return False

    @property
    def middleware(self) -> Middleware:
        """The outermost middleware: every answer, also an error, leaves through it."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self.check(request)
                response = self._preflight() if request.method == "OPTIONS" else await handler(request)
            except (LichenError, web.HTTPException) as error:
                response = error_response(_translated(error, request))
            except Exception as error:
                log.exception("%s %s failed.", request.method, request.path)
                response = error_response(
                    LichenError(f"An internal error occurred ({type(error).__name__}).")
                )
            return response

        return guarded

    @staticmethod
    def _preflight() -> web.Response:
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            },
        )

    async def allow_reading(self, request: web.Request, response: web.StreamResponse) -> None:
        """aiohttp `on_response_prepare` signal: let a page that may call also read the answer."""
        origin = request.headers.get("Origin")
        if origin is not None and self.allows_origin(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"


def error_body(error: LichenError) -> dict[str, object]:
    """An error in OpenAI's shape."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}


def error_response(error: LichenError) -> web.Response:
    """An error as an HTTP answer."""
    response = web.Response(
        status=error.status, body=msgspec.json.encode(error_body(error)), content_type="application/json"
    )
    response[ERROR_CODE] = error.code
    if (retry_after := getattr(error, "retry_after", None)) is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response


def _translated(error: LichenError | web.HTTPException, request: web.Request) -> LichenError:
    if isinstance(error, LichenError):
        return error
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return PayloadTooLarge("The body is larger than this daemon accepts.", hint="See --max-body.")
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"There is no {request.path} here.", hint="The API begins at /v1.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        return _MethodNotAllowed(f"{request.method} is not allowed for {request.path}.")
    return RequestError(f"{error.reason}.")


class _MethodNotAllowed(RequestError):
    """HTTP's own 405; nothing outside this file raises it."""

    status = 405
    code = "method_not_allowed"


def _host_name(header: str) -> str:
    """The name in a Host header, without its port and brackets."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
