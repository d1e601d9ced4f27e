"""Model sources, one file a scheme: where the bytes of a model come from.

A source turns the part of a reference after its scheme into an `Origin`. Adding a scheme adds a file
with one coroutine, `locate(rest) -> Origin`, and touches nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path

from lichen.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where to get a model: a local `path`, or a `url` to download.

    headers: for the request; they are not sent on to another host. sha256, size: of the downloaded bytes,
    where the source knows them. member: the file to take out of the downloaded zip; "" means its only GGUF.
    """

    file_name: str
    path: Path | None = None
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None
    size: int | None = None
    member: str | None = None


def schemes() -> list[str]:
    """The schemes that have a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def is_local(reference: str) -> bool:
    """Whether a reference needs no network."""
    return reference.partition(":")[0] in ("file", "fleet")


async def locate(reference: str) -> Origin:
    """Ask a reference's source where its bytes are. Raises SourceError."""
    scheme, colon, rest = reference.partition(":")
    if not colon or scheme not in schemes():
        raise SourceError(
            f"{reference!r} is neither a model that lichen knows nor a source.",
            hint=f"Sources begin with one of: {', '.join(s + ':' for s in schemes())}.",
        )
    origin: Origin = await importlib.import_module(f"{__name__}.{scheme}").locate(rest)
    return origin
