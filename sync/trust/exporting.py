"""The fleet's repository on a stick, for machines without a network: the format that mirrors have.

    metadata/            every root since the first, and what this machine trusts now
    targets/, recipes/   the chosen targets as whole files, and the recipes of their chunks

Packs stay out: an importing machine reads the chunks that it lacks inside the whole files. Nothing on the
stick is believed by whoever imports it. Bytes come first and `timestamp.json` last, so that a stick that is
pulled out too early offers what it offered before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lichen.durable import write_file
from lichen.errors import FleetError, NotFound, SourceError
from lichen.sync.certificates import trusted
from lichen.sync.download import check_space, write_error
from lichen.sync.manifest import KINDS
from lichen.sync.recipe import recipe_path
from lichen.sync.store import Store
from lichen.sync.trust.bringing import FleetSupply
from lichen.sync.trust.device import Device, FleetTarget
from lichen.sync.trust.fetching import fetcher_for, read
from lichen.sync.trust.verification import ROOT_LIMIT, standing

POLICY_LIMIT = 1 << 20  # bytes


async def export(
    device: Device, store: Store, folder: Path, targets: Sequence[str] = (), *, running: str
) -> list[str]:
    """Write a repository to `folder`; the paths of its targets. Fetches what is not here.

    targets: what to take along; by default what is in use on this machine. Policies always come along.
    Raises FleetError and its kinds, SourceError, DiskFull, StoreError.
    """
    listed = {
        target.manifest.path: target
        for kind in KINDS
        for target in await device.listed(kind, running=running)
    }
    used = {slot.active.target for slot in store.slots.mendable().values() if slot.active is not None}
    chosen = set(targets or used & listed.keys())
    if unknown := sorted(chosen - listed.keys()):
        raise FleetError(f"The fleet has no target {unknown[0]!r}.", hint=f"It has: {', '.join(listed)}.")
    chosen |= {path for path in listed if path.startswith("policies/")}
    supply = FleetSupply(device, store, running=running)
    for path in sorted(chosen):
        target = listed[path]
        if path.startswith("policies/"):
            data = await device.content(target, POLICY_LIMIT)
            await asyncio.to_thread(_put, folder / "targets" / target.file_name, data)
            continue
        await supply.bring(await supply.find(path), progress=None, pace=None)
        await asyncio.to_thread(_copy, store.blob(target.sha256), folder / "targets" / target.file_name)
        await _copy_recipe(device, target, folder)
    await _write_metadata(device, folder)
    return sorted(chosen)


async def _copy_recipe(device: Device, target: FleetTarget, folder: Path) -> None:
    """The signed recipe, from whichever mirror still has it; without it the file is imported whole."""
    if target.manifest.recipe is None:
        return
    name = recipe_path(target.sha256)
    data = await _from_mirrors(device, name, target.manifest.recipe.size)
    if data is not None and hashlib.sha256(data).hexdigest() == target.manifest.recipe.sha256:
        await asyncio.to_thread(_put, folder / name, data)


async def _write_metadata(device: Device, folder: Path) -> None:
    trusted = device.trusted()
    newest = standing(trusted).versions["root"]
    for version in range(1, newest):
        data = await _from_mirrors(device, f"metadata/{version}.root.json", ROOT_LIMIT)
        if data is not None:
            await asyncio.to_thread(_put, folder / "metadata" / f"{version}.root.json", data)
    for role, data in trusted.items():
        name = f"{json.loads(data)['signed']['version']}.{role}.json"
        if role != "timestamp":
            await asyncio.to_thread(_put, folder / "metadata" / name, data)
    await asyncio.to_thread(_put, folder / "metadata" / "timestamp.json", trusted["timestamp"])


async def _from_mirrors(device: Device, name: str, limit: int) -> bytes | None:
    import httpx

    async with httpx.AsyncClient(
        verify=trusted(), follow_redirects=False, timeout=httpx.Timeout(20)
    ) as client:
        for url in device.enrolment().mirrors:
            try:
                return await read(fetcher_for(url, client), name, limit)
            except (NotFound, SourceError):
                continue
    return None


def _put(path: Path, data: bytes) -> None:
    try:
        write_file(path, data)
    except OSError as error:
        raise write_error(path, error) from error


def _copy(blob: Path, place: Path) -> None:
    """A file of the store to the stick, whole or not at all. Blocks. Raises DiskFull, StoreError."""
    size = blob.stat().st_size
    if place.is_file() and place.stat().st_size == size:
        return
    staged = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        check_space(place.parent, size)
        shutil.copyfile(blob, staged)
        staged.replace(place)
    except OSError as error:
        raise write_error(place, error) from error
    finally:
        staged.unlink(missing_ok=True)
