"""An HTTP server on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """Serves until it is closed. knows: the attribute of `handler` that this server becomes."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], knows: str) -> None:
        own = type("Handler", (handler,), {knows: self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), own)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
