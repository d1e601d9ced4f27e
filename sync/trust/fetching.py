"""Bytes by name from one mirror: over HTTP, or from a folder. Nothing that arrives here is trusted.

A fetcher bounds what a mirror can cost: never more bytes than asked for, never a wait without end.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from lichen.errors import FleetError, NotFound, SourceError

if TYPE_CHECKING:
    import httpx

CHUNK = 1 << 16
PATIENCE = 20.0  # seconds that any file may take
SLOWEST = 16_384  # bytes a second that a mirror must reach after that
_NAME = re.compile(r"(?:[A-Za-z0-9_%~-][A-Za-z0-9._%~@+ -]*/)*[A-Za-z0-9_%~-][A-Za-z0-9._%~@+ -]*")


Result = TypeVar("Result")


class CannotResume(SourceError):
    """This mirror sends the file only from its beginning."""


class TooLong(SourceError):
    """This mirror sends more than the file may have, so nothing that it sent is worth keeping."""


class Fetcher(Protocol):
    """One mirror."""

    @property
    def address(self) -> str:
        """Where it is, for errors."""

    def stream(self, name: str, limit: int, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a file from `start` on, which ends at `limit` or before.

        name: relative to the mirror, with "/" between folders; percent signs are literal.
        Raises NotFound if there is no such file, CannotResume where it only begins at 0, SourceError for
        anything else.
        """


async def read(fetcher: Fetcher, name: str, limit: int) -> bytes:
    """A whole file of at most `limit` bytes. Raises NotFound or SourceError."""
    return b"".join([part async for part in fetcher.stream(name, limit)])


class FolderFetcher:
    """A mirror that is a folder: a stick, a share, a test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def address(self) -> str:
        """The folder."""
        return str(self._folder)

    async def stream(self, name: str, limit: int, start: int = 0) -> AsyncIterator[bytes]:
        """See Fetcher. A name that leads out of the folder is refused."""
        path = self._folder / checked_name(name)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{self._folder} has no file {name}.") from error
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
        with file:
            sent = file.seek(start)
            while data := await asyncio.to_thread(file.read, CHUNK):
                sent += len(data)
                if sent > limit:
                    raise too_long(self.address, name, limit)
                yield data


class HttpFetcher:
    """A mirror behind a URL. Redirects are not followed: a mirror is where the fleet says it is.

    patience: seconds that a file may take in any case; after them it must have come at `slowest` bytes/s.
    """

    def __init__(
        self, client: httpx.AsyncClient, base: str, *, patience: float = PATIENCE, slowest: int = SLOWEST
    ) -> None:
        self._client, self._base = client, base.rstrip("/")
        self._patience, self._slowest = patience, slowest

    @property
    def address(self) -> str:
        """The URL without what may be secret in it."""
        parts = urlsplit(self._base)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"

    async def stream(self, name: str, limit: int, start: int = 0) -> AsyncIterator[bytes]:
        """See Fetcher."""
        import httpx

        headers = {"Accept-Encoding": "identity", "Cache-Control": "no-cache"}
        if start:
            headers["Range"] = f"bytes={start}-"
        begun, sent = time.monotonic(), 0
        request = self._client.build_request("GET", f"{self._base}/{checked_name(name)}", headers=headers)
        try:
            answer = await self._in_time(self._client.send(request, stream=True), self._patience, name)
            try:
                if answer.status_code in (403, 404, 410):
                    raise NotFound(f"{self.address} has no file {name}.")
                if start and not (
                    answer.status_code == 206
                    and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                ):
                    raise CannotResume(f"{self.address} does not send {name} from byte {start:,} on.")
                if answer.status_code != (206 if start else 200):
                    raise SourceError(f"{self.address} answered {answer.status_code} for {name}.")
                parts = answer.aiter_raw(CHUNK).__aiter__()
                while True:
                    left = self._patience + sent / self._slowest - (time.monotonic() - begun)
                    data = await self._in_time(anext(parts, b""), left, name)
                    if not data:
                        break
                    sent += len(data)
                    if start + sent > limit:
                        raise too_long(self.address, name, limit)
                    yield data
            finally:
                await answer.aclose()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise SourceError(
                f"{self.address} cannot be reached: {str(error) or type(error).__name__}."
            ) from error

    async def _in_time(self, step: Awaitable[Result], seconds: float, name: str) -> Result:
        try:
            return await asyncio.wait_for(step, max(seconds, 0))
        except TimeoutError as error:
            raise SourceError(
                f"{self.address} sends {name} too slowly.", hint="Try another mirror."
            ) from error


def checked_name(name: str) -> str:
    """`name` if it stays below a mirror's folder. Raises SourceError."""
    if len(name) > 1024 or not _NAME.fullmatch(name):
        raise SourceError(f"{name[:80]!r} is no name of a file that a mirror may be asked for.")
    return name


def too_long(address: str, name: str, limit: int) -> TooLong:
    """The error about a file that does not end where it should."""
    return TooLong(f"{address} sends more than the {limit:,} bytes that {name} may have.")


def fetcher_for(url: str, client: httpx.AsyncClient) -> Fetcher:
    """The fetcher of a mirror's URL: http, https or file. Raises FleetError for another."""
    parts = urlsplit(check_mirror(url))
    if parts.scheme == "file":
        return FolderFetcher(Path(unquote(parts.path)))
    return HttpFetcher(client, url)


def check_mirror(url: str) -> str:
    """The URL, if it can be a mirror's. Raises FleetError."""
    try:
        parts = urlsplit(url)
        fine = bool(parts.hostname) if parts.scheme in ("http", "https") else parts.path.startswith("/")
        _ = parts.port
    except ValueError:
        fine, parts = False, urlsplit("")
    if not fine or parts.scheme not in ("http", "https", "file") or parts.query or parts.fragment:
        raise FleetError(
            f"{url[:200]!r} cannot be a mirror.", hint="Give an https:, http: or file: URL of a folder."
        )
    return url
