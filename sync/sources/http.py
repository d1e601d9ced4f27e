"""`http://host/path/model.gguf`: as https, without encryption; for mirrors on one's own network."""

from __future__ import annotations

from lichen.sync.sources import Origin
from lichen.sync.sources.https import url_origin


async def locate(rest: str) -> Origin:
    """The file at this URL. Raises SourceError for one without a host."""
    return url_origin(f"http:{rest}")
