"""Where published files are read from: any place that gives out ranges of bytes.

HTTP and HTTPS go through httpx; every other scheme (`file:`, `memory:`, `s3:`, `gs:` ...) through fsspec,
whose package for that scheme must be installed. A mirror is not trusted with anything but being slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Protocol

from lichen.errors import ConfigError, SourceError
from lichen.sync.certificates import trusted
from lichen.sync.download import opened
from lichen.sync.extra import of_the_extra
from lichen.sync.sources import Origin

if TYPE_CHECKING:
    import httpx

BLOCK = 1 << 16  # bytes of a part over HTTP
FILE_BLOCK = 1 << 18  # bytes that are asked of fsspec at a time
PATIENCE = 30.0  # seconds for a connection, and between two arrivals of bytes


class Mirror(Protocol):
    """A place with recipes, packs and files (see publish.py)."""

    name: str

    def read(self, path: str, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        """Bytes start..stop (None: to the end) of a file, in parts of any length.

        Raises SourceError where it cannot; what it gives is not believed, so it may also give too few or
        others.
        """
        ...


class HttpMirror:
    """A static file server or object store. headers: such as a token; other hosts do not get them."""

    def __init__(self, url: str, *, headers: dict[str, str] | None = None) -> None:
        self.name = url.rstrip("/")
        self._headers = headers or {}
        self._client: httpx.AsyncClient | None = None

    async def read(self, path: str, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        """See Mirror. Servers that ignore ranges are refused rather than read from their beginning."""
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                verify=trusted(), follow_redirects=False, timeout=httpx.Timeout(PATIENCE)
            )
        origin = Origin(file_name=path, url=f"{self.name}/{path}", headers=self._headers)
        wanted = {"Accept-Encoding": "identity"}
        ranged = start > 0 or stop is not None
        if ranged:
            wanted["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            async with opened(self._client, origin, wanted) as answer:
                if answer.status_code != (206 if ranged else 200):
                    what = "does not give out ranges" if answer.status_code == 200 else "answered"
                    raise SourceError(f"{origin.url} {what} ({answer.status_code} {answer.reason_phrase}).")
                span = answer.headers.get("Content-Range", "")
                if ranged and not span.startswith(f"bytes {start}-"):
                    raise SourceError(
                        f"{origin.url} gives another range than it was asked for: {span[:80]!r}."
                    )
                async for data in answer.aiter_raw(BLOCK):
                    yield data
        except httpx.HTTPError as error:
            raise SourceError(
                f"The connection to {self.name} broke off: {str(error) or type(error).__name__}."
            ) from error

    async def close(self) -> None:
        """End its connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


class FsspecMirror:
    """A folder in any file system that fsspec knows. options: what that file system takes, such as `anon`."""

    def __init__(self, url: str, **options: Any) -> None:
        with of_the_extra():
            import fsspec

        self.name = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.name, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"The mirror {url} cannot be used: {error}.", hint="Install fsspec's package for that scheme."
            ) from error

    async def read(self, path: str, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        """See Mirror."""
        where = f"{self._root}/{path}"
        try:
            size = await asyncio.to_thread(self._files.size, where)
            for at in range(start, min(size, size if stop is None else stop), FILE_BLOCK):
                end = min(at + FILE_BLOCK, size if stop is None else stop)
                yield await asyncio.to_thread(self._files.cat_file, where, at, end)
        except Exception as error:  # each file system has its own kinds
            raise SourceError(f"{self.name}/{path} cannot be read: {error}.") from error

    async def close(self) -> None:
        """Nothing is held open."""


def open_mirror(url: str, **options: Any) -> HttpMirror | FsspecMirror:
    """The mirror of a URL; options go to its class. Raises ConfigError."""
    if url.startswith(("http://", "https://")):
        return HttpMirror(url, **options)
    return FsspecMirror(url, **options)
