"""Whether a version fits this machine, before it is put into use: the assignment, the bytes and the base."""

from __future__ import annotations

from lichen.errors import AdapterError, HashMismatch, ManifestError, TrustError
from lichen.quant.adapter_check import check_adapter
from lichen.quant.gguf_check import check_gguf
from lichen.sync.download import hash_file
from lichen.sync.manifest import AdapterManifest, AnyManifest, CheckpointManifest, ModelManifest
from lichen.sync.store import Store
from lichen.sync.updates.health import Installed
from lichen.sync.updates.slots import Slots, Version
from lichen.sync.updates.states import Assignment, Update
from lichen.sync.updates.supply import Offer


def check_assignment(assignment: Assignment, offer: Offer) -> None:
    """Raise TrustError unless the signed target is what the assignment means, of the slot's own kind."""
    kind, slash, name = assignment.slot.partition("/")
    if kind != offer.manifest.kind or not slash or not name or "/" in name:
        raise TrustError(
            f"{assignment.target} is of kind {offer.manifest.kind} and cannot be {assignment.slot}."
        )
    if assignment.sha256 not in (None, offer.sha256):
        raise TrustError(
            f"{assignment.target} has sha256 {offer.sha256} by now, but this machine should have "
            f"{assignment.sha256}."
        )


def check_blob(store: Store, update: Update) -> None:
    """Hash a version's bytes, and check a model's header. Blocks.

    Raises HashMismatch, after which the bytes are gone and are fetched again by another update, and
    ModelFileError.
    """
    blob = store.blob(update.sha256)
    whole = blob.is_file() and hash_file(blob) == update.sha256
    if not whole:
        blob.unlink(missing_ok=True)
        raise HashMismatch(
            f"The bytes of {update.target} were damaged on this machine.", hint="Pull it again."
        )
    if isinstance(update.manifest, ModelManifest):
        check_gguf(blob)


def check_base(store: Store, slots: Slots, manifest: AnyManifest) -> None:
    """Raise ManifestError where an adapter or a checkpoint was made for a model that is not here."""
    base = _base(manifest)
    if base is None:
        return
    here = {each.sha256 for each in store.manifests()}
    if base not in here or not store.blob(base).is_file():
        raise ManifestError(
            f"{manifest.path} was made for the model with sha256 {base}, which is not on this machine.",
            hint="Pull that model first.",
        )


def check_fit(store: Store, update: Update) -> None:
    """Raise AdapterError or ModelFileError where an adapter is none, or does not fit its model. Blocks."""
    manifest = update.manifest
    if isinstance(manifest, AdapterManifest):
        summary = check_adapter(store.blob(update.sha256), store.blob(manifest.base))
        if summary.base not in ("", manifest.base):
            raise AdapterError(
                f"{manifest.path} was trained over the model {summary.base[:12]}, not {manifest.base[:12]}."
            )


def tried(manifest: AnyManifest) -> bool:
    """Whether the engine can try such a version."""
    if isinstance(manifest, CheckpointManifest):
        return manifest.use == "draft_head"
    return isinstance(manifest, ModelManifest | AdapterManifest)


def installed(store: Store, slot: str, version: Version) -> Installed:
    """A version as the engine is given it."""
    base = _base(version.manifest)
    return Installed(
        slot=slot,
        sha256=version.sha256,
        path=store.blob(version.sha256),
        base=None if base is None else store.blob(base),
        base_sha256=base or "",
    )


def _base(manifest: AnyManifest) -> str | None:
    return manifest.base if isinstance(manifest, AdapterManifest | CheckpointManifest) else None
