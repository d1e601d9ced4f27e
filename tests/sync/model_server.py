"""A small HTTP server for tests: ranges, hashes, redirects, and bad behaviour on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from tests.sync.local_server import LocalServer


class ModelServer(LocalServer):
    """Serves `files` by path. Counts what it sent; can throttle, cut, lie and change."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag = '"one"'
        self.ranges: list[str] = []
        self.sent = 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.cut_after: int | None = None  # bytes of an answer after which the connection ends, once
        self.pause = 0.0  # seconds between chunks of 64 KiB
        self.extra = b""  # sent after the announced end
        self.redirects: dict[str, str] = {}
        self.answers: dict[str, Callable[[str], tuple[int, dict[str, str], bytes]]] = {}
        super().__init__(_Handler, "models")


class _Handler(BaseHTTPRequestHandler):
    models: ModelServer  # set on the subclass that each server makes
    protocol_version = "HTTP/1.0"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.models.requests.append((self.path, dict(self.headers)))
        if self.path in self.models.redirects:
            self.send_response(302)
            self.send_header("Location", self.models.redirects[self.path])
            self.end_headers()
        elif self.path in self.models.answers:
            status, headers, data = self.models.answers[self.path](self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if body else b"")
        elif self.path in self.models.files:
            self._file(self.models.files[self.path], body=body)
        else:
            self.send_error(404)

    def _file(self, data: bytes, *, body: bool) -> None:
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range", self.models.etag) == self.models.etag:
            self.models.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.models.etag)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self._send(data[start:] + self.models.extra)

    def _send(self, data: bytes) -> None:
        cut, self.models.cut_after = self.models.cut_after, None
        data = data if cut is None else data[:cut]
        for at in range(0, len(data), 1 << 16):
            try:
                self.wfile.write(data[at : at + (1 << 16)])
            except OSError:
                return
            self.models.sent += len(data[at : at + (1 << 16)])
            time.sleep(self.models.pause)

    def log_message(self, *_: object) -> None:
        return None
