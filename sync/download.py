"""Downloading one file so that nothing is lost: resumed by range, hashed, and never longer than it should be.

A partial file `X.part` has a note `X.json` beside it that says which bytes it holds (URL, validator).
They survive a `kill -9`; the next run continues if the server still has the same file, and starts
again if not.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lichen.errors import DiskFull, HashMismatch, SourceError, StoreError
from lichen.sync.certificates import trusted
from lichen.sync.sources import Origin

if TYPE_CHECKING:
    import httpx

CHUNK = 1 << 20
ATTEMPTS = 6  # tries in a row without one new byte
SYNC_EVERY = 16 << 20  # bytes between two fsyncs of the partial file
MARGIN = 64 << 20  # bytes of free space to leave

Report = Callable[[int, int | None], None]


class _Note(msgspec.Struct):
    """What a partial file holds: bytes of `url` in the state named by `validator` (ETag or date)."""

    url: str
    validator: str = ""


async def download(origin: Origin, partial: Path, report: Report) -> str:
    """Fetch `origin` into `partial`, continuing what is there; returns the sha256 in hex.

    Raises SourceError (the server refused, lied or kept breaking off), DiskFull, or HashMismatch when
    the bytes are not those that the source pinned; the partial file is then removed.
    """
    import httpx

    if origin.size is not None:
        check_space(partial.parent, origin.size - _size(partial))
    failures = 0
    async with httpx.AsyncClient(
        verify=trusted(), follow_redirects=False, timeout=httpx.Timeout(30)
    ) as client:
        while True:
            before = _size(partial)
            try:
                await _fetch(client, origin, partial, report)
                break
            except httpx.TransportError as error:
                failures = 0 if _size(partial) > before else failures + 1
                if failures >= ATTEMPTS:
                    raise SourceError(
                        f"The connection to {httpx.URL(origin.url).host} keeps breaking off: "
                        f"{str(error) or type(error).__name__}.",
                        hint="Run the same command again to continue where it stopped.",
                    ) from error
                await asyncio.sleep(min(0.2 * 2**failures, 10))
    digest = await asyncio.to_thread(hash_file, partial)
    if origin.sha256 is not None and digest != origin.sha256:
        forget(partial)
        raise HashMismatch(
            f"{origin.file_name} has sha256 {digest}, but its source promised {origin.sha256}.",
            hint="Nothing was kept; try again, and do not use this source if it happens twice.",
        )
    return digest


async def _fetch(client: httpx.AsyncClient, origin: Origin, partial: Path, report: Report) -> None:
    """One connection: append to the partial file, or start it again if the remote file has changed."""
    import httpx

    note = _read_note(partial)
    have = _size(partial) if note is not None and note.url == origin.url else 0
    if origin.size is not None and have == origin.size:
        return
    headers = {"Accept-Encoding": "identity"}
    if have and note is not None:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": note.validator} if note.validator else {})
    async with opened(client, origin, headers) as answer:
        if answer.status_code == 416 and have:  # nothing after what we have: it is complete, or not ours
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return
            forget(partial)
            raise httpx.RemoteProtocolError("the partial file does not fit the server's")
        if answer.status_code not in (200, 206):
            raise SourceError(f"{origin.url} answered {answer.status_code} {answer.reason_phrase}.")
        have = have if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else origin.size
        if origin.size is not None and total != origin.size:
            raise SourceError(f"{origin.url} has {total} bytes, but {origin.size} were announced.")
        if total is not None:
            check_space(partial.parent, total - have)
        validator = answer.headers.get("ETag", "")
        validator = "" if validator.startswith("W/") else validator
        _write_note(partial, _Note(origin.url, validator or answer.headers.get("Last-Modified", "")))
        await _append(answer, partial, have, total, report)


class opened:
    """A streamed GET that follows redirects by hand: secrets stay with the first host."""

    def __init__(self, client: httpx.AsyncClient, origin: Origin, headers: dict[str, str]) -> None:
        self._client, self._origin, self._headers = client, origin, headers
        self._answer: httpx.Response | None = None

    async def __aenter__(self) -> httpx.Response:
        import httpx

        url = httpx.URL(self._origin.url)
        first = url
        for _ in range(8):
            secret = self._origin.headers if (url.scheme, url.netloc) == (first.scheme, first.netloc) else {}
            request = self._client.build_request("GET", url, headers={**self._headers, **secret})
            self._answer = await self._client.send(request, stream=True)
            if not self._answer.has_redirect_location:
                return self._answer
            url = url.join(self._answer.headers["Location"])
            await self._answer.aclose()
            if url.scheme not in ("http", "https") or (first.scheme, url.scheme) == ("https", "http"):
                raise SourceError(
                    f"{self._origin.url} redirects to {url.scheme}: {url.host}, which is refused."
                )
        raise SourceError(f"{self._origin.url} redirects too often.")

    async def __aexit__(self, *_: object) -> None:
        if self._answer is not None:
            await self._answer.aclose()


async def _append(answer: Any, partial: Path, have: int, total: int | None, report: Report) -> None:
    limit = total if total is not None else shutil.disk_usage(partial.parent).free - MARGIN
    unsynced = 0
    with partial.open("r+b" if have else "wb") as file:
        file.truncate(have)
        file.seek(have)
        report(have, total)
        async for data in answer.aiter_raw(CHUNK):
            have += len(data)
            if have > limit:
                raise SourceError(
                    f"{answer.url.host} sends more than the {limit} bytes that there should be."
                )
            await asyncio.to_thread(_write, file, data)
            unsynced += len(data)
            if unsynced >= SYNC_EVERY:
                await asyncio.to_thread(os.fsync, file.fileno())
                unsynced = 0
            report(have, total)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    if total is not None and have < total:
        import httpx

        raise httpx.RemoteProtocolError(f"the server stopped after {have} of {total} bytes")


def _write(file: Any, data: bytes) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise write_error(Path(file.name), error) from error


def write_error(path: Path, error: OSError) -> StoreError:
    """A failed write as an error for people: DiskFull for a full disk, else the system's own words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(str(path.parent), CHUNK, shutil.disk_usage(path.parent).free)
    return StoreError(f"{path} cannot be written: {error.strerror}.")


def hash_file(path: Path, report: Callable[[int], None] = lambda _done: None) -> str:
    """sha256 of a file in hex. Blocks: call it off the event loop (hashing itself releases the GIL)."""
    digest, done = hashlib.sha256(), 0
    buffer = bytearray(4 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            done += count
            report(done)
    return digest.hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raise DiskFull unless `needed` bytes and a margin are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > 0 and needed + MARGIN > free:
        raise DiskFull(str(folder), needed + MARGIN, free)


def forget(partial: Path) -> None:
    """Remove a partial file and its note."""
    partial.unlink(missing_ok=True)
    partial.with_suffix(".json").unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_note(partial: Path) -> _Note | None:
    try:
        return msgspec.json.decode(partial.with_suffix(".json").read_bytes(), type=_Note)
    except (OSError, msgspec.DecodeError):
        return None


def _write_note(partial: Path, note: _Note) -> None:
    partial.with_suffix(".json").write_bytes(msgspec.json.encode(note))
