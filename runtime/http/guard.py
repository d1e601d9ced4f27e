"""What every request passes before a route sees it: errors made readable, Host, Origin, API key, rate.

A daemon on localhost can be reached by any web page: through DNS rebinding (a foreign Host header), a
cross-origin request (a foreign Origin header) or a form, which browsers send anywhere without asking.
All are refused from the first byte on, on every path, whether or not there is a route. An upload has the type
of a form, and passes only with a header that a form cannot have.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from lichen.errors import (
    ConfigError,
    Forbidden,
    LichenError,
    ModelFileError,
    NotFound,
    PayloadTooLarge,
    RequestError,
    Unauthorized,
    Unavailable,
)
from lichen.runtime.http.keys import KeyStore
from lichen.runtime.http.limits import UPLOAD_PATH, RateLimiter, is_upload
from lichen.runtime.http.log_format import EXCHANGE, NO_KEY
from lichen.runtime.http.redact import without_secrets
from lichen.runtime.sequence import LOCAL

log = logging.getLogger("lichen.http")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health"})  # need no API key, so that a supervisor can ask
FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
SETTING = "setting"  # in the log, the id of the one key that is a setting

ERROR_CODE: web.ResponseKey[str] = web.ResponseKey("lichen_error_code", str)  # why an answer is an error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def owner() -> str:
    """Whose request is being answered: the id of its API key, or LOCAL where none was needed."""
    exchange = EXCHANGE.get()
    return LOCAL if exchange is None or exchange.key == NO_KEY else exchange.key


class Guard:
    """aiohttp middlewares of one daemon.

    hosts: names that may stand in the Host header, besides loopback; "*" allows any.
    origins: web origins that may call from a browser, besides loopback pages; "*" allows any.
    api_key, keys: the key that is a setting, and those that are kept; where one exists, requests need one.
    """

    def __init__(
        self,
        *,
        hosts: Iterable[str],
        origins: Iterable[str],
        api_key: str | None,
        keys: KeyStore | None,
        rate: RateLimiter,
    ) -> None:
        self._hosts = LOOPBACK | {host.lower() for host in hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._api_key = None if api_key is None else api_key.encode()
        self._keys = keys
        self._rate = rate
        # Never falls back, so that a lost key file opens no door.
        self._locked = api_key is not None or (keys is not None and keys.any())

    def check(self, request: web.Request) -> None:
        """Raise the error of a request that must not be answered."""
        self._check_host(request)
        self._check_origin(request)
        if request.content_type in FORMS and "Content-Type" in request.headers and not is_upload(request):
            raise _Form(
                f"A body of the type {request.content_type} is not accepted.",
                hint="Send JSON with the header: Content-Type: application/json"
                if request.path != UPLOAD_PATH
                else "Send multipart/form-data with the header Authorization, which no form can send.",
            )
        if request.path in OPEN_PATHS or request.method == "OPTIONS":
            return
        address = _address(request)
        try:
            key = self._check_key(request)
        except Unauthorized:
            self._rate.take(address)  # nobody may try keys faster than this
            raise
        if key is not None and (exchange := EXCHANGE.get()) is not None:
            exchange.key, exchange.keeps = key
        self._rate.take(address if key is None else key[0])

    def _check_key(self, request: web.Request) -> tuple[str, bool] | None:
        """The id of the key that the request presents, and whether its answers are kept.

        None where no key is needed. Raises Unauthorized.
        """
        given = _presented(request)
        by_setting = self._api_key is not None and hmac.compare_digest(
            given.encode("utf-8", "surrogateescape"), self._api_key
        )
        if by_setting:
            return SETTING, False
        if self._keys is not None:
            try:
                self._locked = self._locked or self._keys.any()
                kept = self._keys.verify(given) if given else None
            except ConfigError as error:
                log.error("%s", error)
                raise Unavailable(
                    "The API keys of this daemon cannot be read.", hint="Its log says why."
                ) from error
            if kept is not None:
                return kept.id, kept.keeps
        if self._locked:
            raise Unauthorized(
                "This daemon needs an API key.", hint="Send the header: Authorization: Bearer KEY"
            )
        return None

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
                response = await _told(_translated(error, request), request)
            except Exception as error:
                log.exception("%s %s failed.", request.method, request.rel_url.raw_path)
                internal = LichenError(f"An internal error occurred ({type(error).__name__}).")
                response = await _told(internal, request)
            return response

        return guarded

    @staticmethod
    def _preflight() -> web.Response:
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
                "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, X-Request-Id",
                "Access-Control-Max-Age": "600",
            },
        )

    async def allow_reading(self, request: web.Request, response: web.StreamResponse) -> None:
        """aiohttp `on_response_prepare` signal: let a page that may call also read the answer."""
        origin = request.headers.get("Origin")
        if origin is not None and self.allows_origin(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"


def error_text(error: LichenError) -> str:
    """What a client is told. What went wrong on this machine, without its folders and secrets."""
    if error.status >= 500 or isinstance(error, ModelFileError):
        return without_secrets(str(error))
    return str(error)


def error_body(error: LichenError) -> dict[str, object]:
    """An error in OpenAI's shape."""
    message = error_text(error)
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.code}}


def error_response(error: LichenError, *, path: str = "") -> web.Response:
    """An error as an HTTP answer; Ollama's routes word it as one text."""
    body = error_body(error)
    if path.startswith("/api/"):
        body = {"error": error_text(error)}
    response = web.Response(
        status=error.status, body=msgspec.json.encode(body), content_type="application/json"
    )
    response[ERROR_CODE] = error.code
    if (retry_after := getattr(error, "retry_after", None)) is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response


async def _told(error: LichenError, request: web.Request) -> web.StreamResponse:
    """The error as an answer of its own, or at the end of one that has begun."""
    exchange = EXCHANGE.get()
    begun: web.StreamResponse | None = None if exchange is None else exchange.response
    if begun is None:
        return error_response(error, path=request.path)
    # What is no stream of events must not look complete; a client that does not read is not waited for.
    if begun.content_type != "text/event-stream" or request.protocol.writing_paused:
        if request.transport is not None:
            request.transport.abort()
        return begun
    with suppress(ConnectionError, RuntimeError):  # RuntimeError: it was complete already
        await begun.write(b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n")
        await begun.write_eof()
    return begun


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


class _Form(RequestError):
    """HTTP's own 415; nothing outside this file raises it."""

    status = 415
    code = "unsupported_media_type"


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


def _presented(request: web.Request) -> str:
    """The key that a request carries; empty for none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key", "").strip()


def _address(request: web.Request) -> str:
    """Who asks, where no key says it. One person has a whole /64 of IPv6 addresses, so that counts as one."""
    try:
        address = ipaddress.ip_address(request.remote or "")
    except ValueError:
        return "local"  # a Unix socket
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
