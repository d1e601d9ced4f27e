"""A light HTTP/1.1 client for server-sent events: it records while the clock runs and parses afterwards.

The load generator shares its few cores with the server under test, so during a run it only keeps each
piece of bytes with the time it came in. What was in them (head, chunks, events) is worked out when the
run is over, from one joined buffer and a map from byte to time.

Not covered: keep-alive (each request has its own connection), redirects, compression, TLS, and events
whose lines end in a lone carriage return.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
DONE = b"\ndata: [DONE]"  # a raw newline never stands inside JSON, so no answer's text can look like this

Arrival = tuple[float, bytes]  # monotonic seconds, bytes as they were read


class StreamError(ValueError):
    """Bytes that are not an HTTP/1.1 response."""


@dataclass(slots=True)
class Exchange:
    """One request and everything that came back. Times are monotonic seconds."""

    started: float
    finished: float = 0.0
    arrivals: list[Arrival] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """The data of one server-sent event and when its last byte came in (monotonic seconds)."""

    at: float
    data: bytes


class _Recorder(asyncio.Protocol):
    """Keeps what comes in until the server closes or has sent its last event."""

    def __init__(self, request: bytes, exchange: Exchange, done: asyncio.Future[None]) -> None:
        self._request = request
        self._exchange = exchange
        self._done = done
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "create_connection gives a stream transport"
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._exchange.arrivals.append((time.monotonic(), data))
        window = self._tail + data
        if DONE in window:
            self._finish(None)
        self._tail = window[1 - len(DONE) :]

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc)

    def _finish(self, error: Exception | None) -> None:
        if self._done.done():
            return
        self._exchange.finished = time.monotonic()
        if error is not None:
            self._exchange.error = f"the connection broke: {error}"
        self._done.set_result(None)
        if self._transport is not None:
            self._transport.close()


def request_bytes(port: int, path: str, body: Mapping[str, Any] | None = None) -> bytes:
    """A whole HTTP request: POST of JSON, or GET without a body."""
    return raw_request_bytes(port, path, None if body is None else json.dumps(body).encode())


def raw_request_bytes(port: int, path: str, content: bytes | None) -> bytes:
    """The same with a body that need not be JSON."""
    method = "GET" if content is None else "POST"
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content or b'')}\r\n\r\n"
    )
    return head.encode() + (content or b"")


async def exchange(port: int, request: bytes, *, timeout: float) -> Exchange:
    """Send one request and record the answer; what goes wrong is in `error`, never raised. timeout: s."""
    loop = asyncio.get_running_loop()
    record = Exchange(started=time.monotonic())
    done: asyncio.Future[None] = loop.create_future()
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout):
            transport, _ = await loop.create_connection(lambda: _Recorder(request, record, done), HOST, port)
            await done
    except TimeoutError:
        record.error = f"no complete answer within {timeout:g} s, {_what_came(record)}"
    except OSError as error:
        record.error = f"cannot connect: {error}"
    finally:
        if transport is not None:
            transport.close()
    record.finished = record.finished or time.monotonic()
    return record


def exchange_alone(port: int, request: bytes, *, timeout: float) -> Exchange:
    """The same for a single client, blocking: a bare socket costs the server's cores a fifth of what an
    event loop does for each token. timeout: seconds of silence."""
    record = Exchange(started=time.monotonic())
    tail = b""
    try:
        with socket.create_connection((HOST, port), timeout=timeout) as connection:
            connection.sendall(request)
            while data := connection.recv(65536):
                record.arrivals.append((time.monotonic(), data))
                if DONE in tail + data:
                    break
                tail = (tail + data)[1 - len(DONE) :]
    except TimeoutError:
        record.error = f"no complete answer: silent for {timeout:g} s, {_what_came(record)}"
    except OSError as error:
        record.error = f"the connection broke: {error}"
    record.finished = time.monotonic()
    return record


def _what_came(record: Exchange) -> str:
    if not record.arrivals:
        return "nothing came"
    silent = time.monotonic() - record.arrivals[-1][0]
    size = sum(len(data) for _, data in record.arrivals)
    return f"{size:,} bytes came, the last {silent:.0f} s ago: ...{record.arrivals[-1][1][-200:]!r}"


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Parts of a byte stream, with where each part ends and what it is mapped to."""

    ends: list[int]
    marks: list[float]

    def at(self, offset: int) -> float:
        """The mark of the part that holds byte `offset`."""
        return self.marks[bisect_right(self.ends, offset)]


@dataclass(frozen=True, slots=True)
class Response:
    """A parsed answer. `complete`: the body ended as its framing said (always so when it ends by closing)."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    _times: _Pieces

    def events(self) -> Iterator[Event]:
        """Every event's data, in order; comments and other fields are skipped."""
        parts: list[bytes] = []
        last = start = 0
        while (end := self.body.find(b"\n", start)) >= 0:
            line = self.body[start:end].rstrip(b"\r")
            if line.startswith(b"data:"):
                parts.append(line[6:] if line[5:6] == b" " else line[5:])
                last = end
            elif not line and parts:
                yield Event(self._times.at(last), b"\n".join(parts))
                parts = []
            start = end + 1
        if parts:  # the client stops reading at [DONE], perhaps before the blank line that follows
            yield Event(self._times.at(last), b"\n".join(parts))


def parse_response(arrivals: Sequence[Arrival]) -> Response:
    """Status, headers and body of recorded bytes. Raises StreamError."""
    data = b"".join(piece for _, piece in arrivals)
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        raise StreamError(f"the answer has no complete head, only {len(data)} bytes")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    words = status_line.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise StreamError(f"not an HTTP/1.1 status line: {status_line[:80]!r}")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    start = len(head) + 4
    ends = list(itertools.accumulate(len(piece) for _, piece in arrivals))
    raw = _Pieces(ends, [at for at, _ in arrivals])
    if headers.get("transfer-encoding", "").lower() == "chunked":
        spans, complete = _chunk_spans(data, start)
    else:
        length = int(headers["content-length"]) if headers.get("content-length", "").isdecimal() else None
        spans = [(start, len(data))]
        complete = length is None or len(body) >= length
    return Response(int(words[1]), headers, *_assemble(data, spans, complete, raw))


def _chunk_spans(data: bytes, start: int) -> tuple[list[tuple[int, int]], bool]:
    """Where the chunks' contents lie in `data`, and whether the last, empty chunk was seen."""
    spans: list[tuple[int, int]] = []
    while (line_end := data.find(b"\r\n", start)) >= 0:
        size_text = data[start:line_end].split(b";")[0].strip()
        try:
            size = int(size_text, 16)
        except ValueError as error:
            raise StreamError(f"not a chunk size: {size_text[:40]!r}") from error
        if size < 0:
            raise StreamError(f"a chunk of {size} bytes")
        if size == 0:
            return spans, True
        spans.append((line_end + 2, min(line_end + 2 + size, len(data))))
        start = line_end + 2 + size + 2
    return spans, False


def _assemble(
    data: bytes, spans: list[tuple[int, int]], complete: bool, raw: _Pieces
) -> tuple[bytes, bool, _Pieces]:
    """The body and its own map to time: each arrival's share of each span keeps that arrival's time."""
    pieces: list[bytes] = []
    marks: list[float] = []
    for begin, end in spans:
        position = begin
        while position < end:
            index = bisect_right(raw.ends, position)
            stop = min(end, raw.ends[index])
            pieces.append(data[position:stop])
            marks.append(raw.marks[index])
            position = stop
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    return b"".join(pieces), complete, _Pieces(ends, marks)
