"""Where versions come from, as the updater sees it; `sync/trust/bringing.py` is the one that asks a fleet."""

from __future__ import annotations

from typing import Protocol

import msgspec

from lichen.sync.manifest import AnyManifest
from lichen.sync.meter import Progress
from lichen.sync.pace import Pace


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A version that the fleet signed. target: its path. sha256: hex, of its bytes."""

    target: str
    sha256: str
    manifest: AnyManifest


class Supply(Protocol):
    """Finds signed versions and brings their bytes."""

    async def find(self, target: str) -> Offer:
        """What the fleet signed under a path. Raises NotFound, FleetError and its kinds, SourceError."""
        ...

    async def bring(self, offer: Offer, *, progress: Progress | None, pace: Pace | None) -> None:
        """Have the bytes as a blob of the store; what was cut off goes on. Raises StoreError's kinds."""
        ...
