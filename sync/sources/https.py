"""`https://host/path/model.gguf`: a model from any web server; pin it with --sha256."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from lichen.errors import SourceError
from lichen.sync.sources import Origin


async def locate(rest: str) -> Origin:
    """The file at this URL. Raises SourceError for one without a host."""
    return url_origin(f"https:{rest}")


def url_origin(url: str) -> Origin:
    """An origin for a plain URL, whatever its scheme."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise SourceError(f"{url!r} is not a URL: {error}.") from error
    if not host:
        raise SourceError(f"{url!r} has no host name.")
    return Origin(file_name=unquote(PurePosixPath(parts.path).name) or host, url=url)
