"""A static file server with ranges, as a mirror over HTTP: what nginx would do, and what it would not."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.sync.local_server import LocalServer


class RangeServer(LocalServer):
    """Serves the files under `folder`. pause: seconds for each 64 KiB. ignore_ranges: send whole files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pause = 0.0
        self.ignore_ranges = False
        self.requests: list[tuple[str, str]] = []  # path and range
        super().__init__(_Handler, "mirror")


class _Handler(BaseHTTPRequestHandler):
    mirror: RangeServer  # set on the subclass that each server makes
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.mirror.requests.append((self.path, wanted))
        path = self.mirror.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        ranged = bool(wanted) and not self.mirror.ignore_ranges
        first, _, last = wanted.removeprefix("bytes=").partition("-") if ranged else ("0", "", "")
        start, stop = int(first), min(size, int(last) + 1 if last else size)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(stop - start))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            for at in range(start, stop, 1 << 16):
                try:
                    self.wfile.write(file.read(min(1 << 16, stop - at)))
                except OSError:
                    return
                time.sleep(self.mirror.pause)

    def log_message(self, *_: object) -> None:
        return None
