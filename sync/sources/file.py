"""`file:/path/to/model.gguf`: a model that is on this machine already; it is copied into the store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import unquote

from lichen.errors import SourceError
from lichen.sync.sources import Origin


async def locate(rest: str) -> Origin:
    """The file at `rest`, which may be written as a path or as //path. Raises SourceError."""
    return await asyncio.to_thread(_locate, rest)


def _locate(rest: str) -> Origin:
    text = rest[2:] if rest.startswith("//") else rest
    path = Path(text).expanduser()
    if not path.exists():
        path = Path(unquote(text)).expanduser()
    if not path.is_file():
        raise SourceError(f"There is no file {path}.")
    return Origin(file_name=path.name, path=path, size=path.stat().st_size)
