"""Signed targets into the store: by chunks where there is a signed recipe, else as whole files.

Only what neither the store nor an older version in it has is fetched; a call that was cut off continues. The
sha256 that the fleet signed decides over the file in any case.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import msgspec

from lichen.errors import HashMismatch, NotFound, OfflineError, SourceError
from lichen.sync.certificates import trusted
from lichen.sync.fetch import fetch
from lichen.sync.meter import FetchProgress, Progress
from lichen.sync.mirrors import open_mirror
from lichen.sync.pace import Pace
from lichen.sync.recipe import Recipe, decode, recipe_path
from lichen.sync.store import Store
from lichen.sync.trust.device import Device, FleetTarget
from lichen.sync.trust.fetching import Fetcher, fetcher_for, read
from lichen.sync.updates.supply import Offer

if TYPE_CHECKING:
    import httpx


class FleetSupply:
    """`sync.updates.supply.Supply` over the fleet that this machine is in.

    running: the version of this lichen. urls: mirrors instead of the fleet's own, such as a stick's.
    """

    def __init__(self, device: Device, store: Store, *, running: str, urls: Sequence[str] = ()) -> None:
        self._device, self._running = device, running
        self._given = tuple(urls)
        self._store = store
        self._targets: dict[tuple[str, str], FleetTarget] = {}

    async def find(self, target: str) -> Offer:
        """See Supply."""
        import httpx

        self._check_offline()
        async with httpx.AsyncClient(
            verify=trusted(), follow_redirects=False, timeout=httpx.Timeout(20)
        ) as client:
            found = await self._device.target(target, running=self._running, mirrors=self._fetchers(client))
        self._targets[target, found.sha256] = found
        return Offer(target=target, sha256=found.sha256, manifest=found.manifest)

    async def bring(self, offer: Offer, *, progress: Progress | None, pace: Pace | None) -> None:
        """See Supply. offer: one that `find` gave, or a later one of the same bytes."""
        store = self._store
        if store.blob(offer.sha256).is_file():
            return
        self._check_offline()
        found = self._targets.get((offer.target, offer.sha256))
        if found is None:
            await self.find(offer.target)
            found = self._targets.get((offer.target, offer.sha256))
        if found is None:
            raise NotFound(f"The fleet has another version at {offer.target} by now.")
        recipe = await _recipe(found, self._urls)
        if recipe is None or not await self._by_chunks(recipe, found, progress, pace):
            await self._whole(found, progress, pace)

    @property
    def _urls(self) -> tuple[str, ...]:
        return self._given or self._device.enrolment().mirrors

    def _check_offline(self) -> None:
        if self._store.offline and not all(url.startswith("file:") for url in self._urls):
            raise OfflineError(
                "Offline mode is on, and a fleet is asked over the network.",
                hint="Run it without --offline, or import a copy from a folder: lichen import PATH",
            )

    def _fetchers(self, client: httpx.AsyncClient) -> list[Fetcher] | None:
        return [fetcher_for(url, client) for url in self._given] or None

    async def _by_chunks(
        self, recipe: Recipe, target: FleetTarget, progress: Progress | None, pace: Pace | None
    ) -> bool:
        """Whether the recipe gave the file; a wrong one can have been signed."""
        store = Store(self._store.root)  # being offline was looked at: a folder is no network
        if await asyncio.to_thread(_without_packs, self._urls):
            recipe = msgspec.structs.replace(recipe, packs=(), pieces=())
        async with AsyncExitStack() as stack:
            mirrors = [open_mirror(url) for url in self._urls]
            for mirror in mirrors:
                stack.push_async_callback(mirror.close)
            try:
                whole = f"targets/{target.file_name}"
                await fetch(recipe, mirrors, store, progress=progress, pace=pace, whole=whole)
            except HashMismatch:
                return False
        return True

    async def _whole(self, target: FleetTarget, progress: Progress | None, pace: Pace | None) -> None:
        import httpx

        store, size = self._store, target.size
        partial: Path = store.root / "partial" / f"{target.sha256}.whole"
        async with (
            store.locked(f"whole:{target.sha256}"),
            httpx.AsyncClient(verify=trusted(), timeout=20) as client,
        ):
            await self._device.download(target, partial, self._fetchers(client), pace)
            await asyncio.to_thread(store.place, partial, target.sha256)
        if progress is not None:
            progress(FetchProgress("done", size, size, size, 0.0))


def _without_packs(urls: Sequence[str]) -> bool:
    """Whether all mirrors are folders that keep no packs, as sticks do."""
    return all(
        url.startswith("file:") and not (Path(unquote(urlsplit(url).path)) / "packs").is_dir() for url in urls
    )


async def _recipe(target: FleetTarget, urls: Sequence[str]) -> Recipe | None:
    """The target's signed recipe from the first mirror that has it; None without one."""
    import httpx

    signed = target.manifest.recipe
    if signed is None:
        return None
    async with httpx.AsyncClient(
        verify=trusted(), follow_redirects=False, timeout=httpx.Timeout(20)
    ) as client:
        for url in urls:
            try:
                data = await read(fetcher_for(url, client), recipe_path(target.sha256), signed.size)
                if hashlib.sha256(data).hexdigest() == signed.sha256:
                    return await asyncio.to_thread(decode, data, target.sha256)
            except (NotFound, SourceError):
                continue
    return None
