"""The TLS context that connections to mirrors, indexes and collectors share."""

from __future__ import annotations

import functools
import ssl


@functools.cache
def trusted() -> ssl.SSLContext:
    """The certificates that are trusted, read once: each client would take 20 ms for it.

    SSL_CERT_FILE and SSL_CERT_DIR of the environment count, as httpx reads them.
    """
    import httpx

    return httpx.create_ssl_context()
