"""The model store: content-addressed files, and a small manifest for each model name.

    blobs/sha256/<hex>     model files, named by what they hold
    models/<name>.json     manifests
    partial/               downloads under way, resumable
    locks/                 one lock file a reference, so that two pulls of it do the work once
    recipes/<hex>          which chunks a blob is made of (sync/stored.py); made again when it is not there
    active                 which versions from a fleet are in use (sync/updates/slots.py)

Invariants: a blob is complete and has its hash before its name exists (written aside, synced, renamed);
a manifest appears after its blob. A reader therefore never sees half a file, whenever a process dies.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from lichen.durable import sync_folder
from lichen.errors import HashMismatch, ModelFileError, NotFound, OfflineError, StoreError
from lichen.quant.gguf_check import GGUFSummary, check_gguf
from lichen.sync.catalog import CATALOG
from lichen.sync.manifest import ModelManifest as FleetModel
from lichen.sync.sources import Origin, is_local, locate
from lichen.sync.updates.slots import Slots, Version

FLEET = "fleet:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Phase = Literal["resolving", "downloading", "extracting", "hashing", "checking", "done"]


class PullProgress(msgspec.Struct, frozen=True):
    """How far a pull is, in bytes; total None while it is not known."""

    phase: Phase
    done: int
    total: int | None


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows of one model. sha256 in hex and size in bytes are of the GGUF file."""

    name: str
    source: str
    sha256: str
    size: int
    pulled_at: str
    architecture: str
    context_train: int
    file_name: str


Progress = Callable[[PullProgress], None]


class Store:
    """The models under `root`, which is made on the first write. offline: never use the network."""

    def __init__(self, root: Path, *, offline: bool = False) -> None:
        self.root = root
        self.offline = offline
        self.slots = Slots(root)

    def manifests(self) -> list[ModelManifest]:
        """All models, by name, then those from the fleet.

        Raises StoreError naming a manifest that cannot be read.
        """
        folder = self.root / "models"
        own = [self._read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
        return own + self._from_fleet()

    def _from_fleet(self) -> list[ModelManifest]:
        """Each version that is kept, under a name of its own, so that the next one is another model."""
        return [
            _fleet_manifest(name, version)
            for slot, found in sorted(self.slots.mendable().items())
            for kind, _, name in [slot.partition("/")]
            for version in (found.active, found.previous)
            if kind == "models" and version is not None and self.slots.whole(version)
        ]

    def get(self, name: str) -> ModelManifest:
        """One model by name. Raises NotFound with what there is."""
        path = self._manifest_path(name)
        if not path.is_file():
            if sent := [manifest for manifest in self._from_fleet() if manifest.name == name]:
                return sent[0]
            there = ", ".join(manifest.name for manifest in self.manifests())
            raise NotFound(
                f"There is no model {name!r} in the store.",
                hint=f"There are: {there}." if there else "The store is empty: lichen pull smollm2-135m",
            )
        return self._read(path)

    def blob_path(self, manifest: ModelManifest) -> Path:
        """The model file. Raises StoreError if it has gone."""
        path = self.blob(manifest.sha256)
        if not path.is_file():
            raise StoreError(
                f"The file of {manifest.name} has gone from the store.",
                hint=f"Get it again: lichen pull {manifest.source} --name {manifest.name}",
            )
        return path

    def resolve(self, reference: str) -> ModelManifest | None:
        """The model of a name, catalog name or source that is here; None if it has to be pulled."""
        if reference.startswith(FLEET):
            name = reference.removeprefix(FLEET)
            with suppress(NotFound):
                return _fleet_manifest(name, self.slots.serving(f"models/{name}"))
            return None
        if _NAME.fullmatch(reference) and self._manifest_path(reference).is_file():
            return self._present(self.get(reference))
        if sent := [manifest for manifest in self._from_fleet() if manifest.name == reference]:
            return sent[0]
        source = CATALOG[reference].source if reference in CATALOG else reference
        return next((self._present(m) for m in self.manifests() if m.source == source), None)

    def _present(self, manifest: ModelManifest) -> ModelManifest | None:
        return manifest if self.blob(manifest.sha256).is_file() else None

    async def pull(
        self,
        reference: str,
        *,
        name: str | None = None,
        sha256: str | None = None,
        progress: Progress | None = None,
    ) -> ModelManifest:
        """Get a model by catalog name or source, unless it is here already.

        name: to keep it under (default: from the reference). sha256: what the file must have.
        Raises StoreError and its kinds, or ModelFileError for a file that is no sound GGUF.
        """
        entry = CATALOG.get(reference)
        source = entry.source if entry else reference
        pin = (sha256 or (entry.sha256 if entry else None) or "").lower() or None
        if pin is not None and not _SHA256.fullmatch(pin):
            raise StoreError("A sha256 has 64 hexadecimal digits.")
        if name is not None:
            self._manifest_path(name)  # refuses a bad name before any work
        report = _throttled(progress)
        async with self.locked(source):
            found = self._find(source, name, pin)
            if found is not None:
                report(PullProgress("done", found.size, found.size))
                return found
            if self.offline and not is_local(source):
                raise OfflineError(
                    f"Offline mode is on and {reference} is not in the store.",
                    hint="Pull it without --offline.",
                )
            report(PullProgress("resolving", 0, None))
            origin = await locate(source)
            return await self._fetch(source, origin, name or (reference if entry else None), pin, report)

    def _find(self, source: str, name: str | None, pin: str | None) -> ModelManifest | None:
        """A model of this source that is here, under the wanted name and hash."""
        for manifest in self.manifests():
            if manifest.source == source and pin in (None, manifest.sha256) and self._present(manifest):
                if name in (None, manifest.name):
                    return manifest
                return self._write(msgspec.structs.replace(manifest, name=str(name)))
        return None

    async def _fetch(
        self, source: str, origin: Origin, name: str | None, pin: str | None, report: Progress
    ) -> ModelManifest:
        from lichen.sync import download, unpacking

        def told(phase: Phase) -> Callable[[int, int | None], None]:
            return lambda done, of: report(PullProgress(phase, done, of))

        partial = self.root / "partial" / f"{_key(source)}.part"
        partial.parent.mkdir(parents=True, exist_ok=True)
        staged = partial.with_suffix(".gguf")
        if origin.path is not None:
            await asyncio.to_thread(unpacking.copy, origin.path, staged, told("downloading"))
        else:
            await download.download(origin, partial, told("downloading"))
            if origin.member is None:
                partial.replace(staged)
            else:
                await asyncio.to_thread(unpacking.extract, partial, origin.member, staged, told("extracting"))
        try:
            size = staged.stat().st_size
            digest = await asyncio.to_thread(
                download.hash_file, staged, lambda done: report(PullProgress("hashing", done, size))
            )
            if pin is not None and digest != pin:
                raise HashMismatch(
                    f"{origin.file_name} has sha256 {digest}, but {pin} was expected.",
                    hint="Nothing was kept.",
                )
            report(PullProgress("checking", size, size))
            summary = await asyncio.to_thread(check_gguf, staged)
        except (HashMismatch, ModelFileError):
            staged.unlink(missing_ok=True)
            download.forget(partial)
            raise
        manifest = await asyncio.to_thread(
            self._keep, staged, source, origin.file_name, name, digest, summary
        )
        download.forget(partial)
        report(PullProgress("done", size, size))
        return manifest

    def adopt(self, staged: Path, *, source: str, file_name: str) -> ModelManifest:
        """Keep a file that was made on this machine; it moves into the store, under a free name.

        source: a text that says what it was made of, by which `resolve` finds it again. Blocks: the file is
        hashed and checked. Raises StoreError, ModelFileError.
        """
        from lichen.sync.download import hash_file

        summary, digest = check_gguf(staged), hash_file(staged)
        return self._keep(staged, source, file_name, None, digest, summary)

    def _keep(
        self, staged: Path, source: str, file_name: str, name: str | None, digest: str, summary: GGUFSummary
    ) -> ModelManifest:
        """Give a checked file its place, then its manifest."""
        size = self.place(staged, digest).stat().st_size
        return self._write(
            ModelManifest(
                name=name or self._free_name(file_name, digest),
                source=source,
                sha256=digest,
                size=size,
                pulled_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                architecture=summary.architecture,
                context_train=summary.context_train,
                file_name=file_name,
            )
        )

    def place(self, staged: Path, digest: str) -> Path:
        """Move a complete file, whose sha256 in hex is `digest`, to its place as a blob, and return that."""
        blob = self.blob(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        if blob.is_file():
            staged.unlink()
        else:
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.chmod(0o444)
            staged.replace(blob)
            sync_folder(blob.parent)
        return blob

    def _free_name(self, file_name: str, digest: str) -> str:
        """A name made from a file's, which no other model has."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file_name.removesuffix(".gguf")).strip("-._").lower()[:100]
        name = stem if _NAME.fullmatch(stem) else "model"
        path = self._manifest_path(name)
        if path.is_file() and self._read(path).sha256 != digest:
            return f"{name}-{digest[:8]}"
        return name

    def remove(self, name: str) -> int:
        """Forget a model; returns the bytes that became free (0 while another name has the same file)."""
        manifest = self.get(name)
        if manifest.source.startswith(FLEET):
            raise StoreError(f"{name} belongs to the fleet.", hint="Its publisher can take it back.")
        self._manifest_path(name).unlink()
        return manifest.size if self.discard({manifest.sha256}) else 0

    def discard(self, digests: Collection[str]) -> int:
        """Remove the files with these sha256 (hex), whole and partial, that nothing names; how many."""
        kept = {manifest.sha256 for manifest in self.manifests()} | self.slots.held()
        gone = [digest for digest in sorted(digests) if digest not in kept]
        for digest in gone:
            for part in ("chunks", "whole", "whole.part"):
                (self.root / "partial" / f"{digest}.{part}").unlink(missing_ok=True)
            self.blob(digest).unlink(missing_ok=True)
        return len(gone)

    async def verify(self, name: str) -> None:
        """Hash a model's file again. Raises HashMismatch when it is not what it was."""
        from lichen.sync.download import hash_file

        manifest = self.get(name)
        digest = await asyncio.to_thread(hash_file, self.blob_path(manifest))
        if digest != manifest.sha256:
            raise HashMismatch(
                f"The file of {name} was changed: it has sha256 {digest}, not {manifest.sha256}.",
                hint=f"Remove and pull it again: lichen rm {name}",
            )

    def blob(self, sha256: str) -> Path:
        """Where the file with this sha256 (64 hexadecimal digits) lies, or would lie."""
        return self.root / "blobs" / "sha256" / sha256

    def _manifest_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StoreError(
                f"{name!r} cannot be a model's name.",
                hint="Use up to 128 letters, digits, dots, dashes and underscores.",
            )
        return self.root / "models" / f"{name}.json"

    def _read(self, path: Path) -> ModelManifest:
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=ModelManifest)
        except (OSError, msgspec.DecodeError) as error:
            raise StoreError(
                f"The manifest {path} cannot be read: {error}.", hint="Delete it and pull again."
            ) from error
        if not _SHA256.fullmatch(manifest.sha256) or manifest.name != path.stem:
            raise StoreError(f"The manifest {path} is damaged.", hint="Delete it and pull again.")
        return manifest

    def _write(self, manifest: ModelManifest) -> ModelManifest:
        path = self._manifest_path(manifest.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        with staged.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        sync_folder(path.parent)
        return manifest

    @asynccontextmanager
    async def locked(self, source: str) -> AsyncIterator[None]:
        """Hold the lock of one source (any text), waiting for another process without blocking the loop."""
        from filelock import FileLock, Timeout

        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"The store {self.root} cannot be written: {error.strerror}.",
                hint="Set LICHEN_HOME to another folder.",
            ) from error
        lock = FileLock(folder / f"{_key(source)}.lock", thread_local=False)
        while True:
            try:
                lock.acquire(blocking=False)
                break
            except Timeout:
                await asyncio.sleep(0.1)
        try:
            yield
        finally:
            lock.release()


def _fleet_manifest(name: str, version: Version) -> ModelManifest:
    manifest = version.manifest
    assert isinstance(manifest, FleetModel), "the updater puts only models into slots of models"
    return ModelManifest(
        name=f"{name}-{version.sha256[:8]}",
        source=f"{FLEET}{name}",
        sha256=version.sha256,
        size=manifest.size,
        pulled_at="",
        architecture=manifest.architecture,
        context_train=manifest.context,
        file_name=f"{manifest.name}.gguf",
    )


def _key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:24]


def _throttled(progress: Progress | None) -> Progress:
    """At most ten reports a second, but every change of phase and the end of each."""
    if progress is None:
        return lambda _now: None
    last: tuple[str, float] = ("", 0.0)

    def report(now: PullProgress) -> None:
        nonlocal last
        moment = time.monotonic()
        if now.phase != last[0] or now.done == now.total or moment - last[1] >= 0.1:
            last = (now.phase, moment)
            progress(now)

    return report
