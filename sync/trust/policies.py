"""A device's look at the policy of one name: verified like any target, then read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lichen.errors import ManifestError, NotFound
from lichen.sync.manifest import PolicyManifest
from lichen.sync.rollout import LIMIT, SCHEMA, Policy, read_policy
from lichen.sync.trust.device import Device
from lichen.sync.trust.fetching import Fetcher


async def fetch_policy(
    device: Device, name: str, *, kept: Path, running: str, mirrors: Sequence[Fetcher] | None = None
) -> Policy | None:
    """The rollout of a name, or None if the fleet has none. running: this lichen's version.

    kept: a folder for the last policy of each name, so that an unchanged one costs the timestamp alone.

    Raises TrustError, MetadataExpired, SourceError, or ManifestError for one that this lichen does not know:
    then the device keeps what it has.
    """
    try:
        target = await device.target(f"policies/{name}", running=running, mirrors=mirrors)
    except NotFound:
        return None
    manifest = target.manifest
    if not isinstance(manifest, PolicyManifest) or manifest.schema != SCHEMA or target.size > LIMIT:
        raise ManifestError(f"The fleet's policy {name!r} is not one that this lichen knows.")
    file = kept / name
    data = _kept(file, target.sha256)
    if data is None:
        await device.download(target, file, mirrors)
        data = file.read_bytes()
    policy = read_policy(data)
    if policy.name != name:
        raise ManifestError(f"The fleet's policy {name!r} says that it is {policy.name!r}.")
    return policy


def _kept(file: Path, sha256: str) -> bytes | None:
    """The bytes of a file that has this hash."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None
