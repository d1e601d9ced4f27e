"""What a target of a fleet says of itself, typed by its kind; it travels inside the signed metadata.

Unknown fields are ignored, so that a publisher may add some. A change that an older lichen must not ignore
raises `min_lichen`, which is looked at before anything else is believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lichen.errors import ManifestError
from lichen.sync.recipe import MAX_RECIPE
from lichen.sync.updates.health import Health

KINDS = ("models", "adapters", "mixtures", "checkpoints", "policies")

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
Words = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")


class Ancestor(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that a target was made from: what it was to the target, and its digest where it has one."""

    what: Words
    sha256: Sha256 | None = None


class RecipeFile(Struct, frozen=True, kw_only=True):
    """The recipe of a target's chunks, so that mirrors cannot lie about it. sha256: hex. size: bytes."""

    sha256: Sha256
    size: Annotated[int, Meta(ge=1, le=MAX_RECIPE)]


class Manifest(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What every kind has. size: bytes. licence: an SPDX expression. lineage: nearest ancestor first.

    health: the bar of the trial on a device. recipe: None for a target that comes as one whole file.
    """

    name: Name
    size: Count
    licence: Words
    lineage: Annotated[tuple[Ancestor, ...], Meta(max_length=64)] = ()
    min_lichen: Annotated[str, Meta(max_length=24)] = "0.1"
    health: Health | None = None
    recipe: RecipeFile | None = None

    @property
    def kind(self) -> str:
        """The kind, which is also the role that may sign it and the folder of its path."""
        return str(self.__struct_config__.tag)

    @property
    def path(self) -> str:
        """The target's path in the repository."""
        return f"{self.kind}/{self.name}"


class ModelManifest(Manifest, frozen=True, kw_only=True, tag="models"):
    """A GGUF model. context: tokens that it was trained for, 0 if not known."""

    architecture: Words
    context: Count = 0


class AdapterManifest(Manifest, frozen=True, kw_only=True, tag="adapters"):
    """A LoRA adapter. base: sha256 of the model that it was trained on, the only one that it fits."""

    base: Sha256
    rank: Annotated[int, Meta(ge=1, le=4096)] | None = None


class MixtureManifest(Manifest, frozen=True, kw_only=True, tag="mixtures"):
    """A mixture of data to train on (mixture.py). sources, examples: how many, 0 if not known."""

    sources: Count = 0
    examples: Count = 0


class CheckpointManifest(Manifest, frozen=True, kw_only=True, tag="checkpoints"):
    """Weights beside a model: a draft head, or a state to train on from. base: the model's sha256."""

    base: Sha256
    use: Literal["draft_head", "training"]


class PolicyManifest(Manifest, frozen=True, kw_only=True, tag="policies"):
    """A document that devices follow. schema: version of the document's own format."""

    schema: Annotated[int, Meta(ge=1, le=1 << 16)]


AnyManifest = ModelManifest | AdapterManifest | MixtureManifest | CheckpointManifest | PolicyManifest


def read_manifest(custom: object, *, running: str) -> AnyManifest:
    """The manifest in a target's custom metadata (what JSON decodes to).

    running: the version of this lichen. Raises ManifestError: malformed, unknown kind, or for a newer lichen.
    """
    if not isinstance(custom, Mapping):
        raise ManifestError("The target has no manifest.", hint="Publish it with: lichen fleet publish")
    kind, needs = custom.get("kind"), custom.get("min_lichen", "0.1")
    if not isinstance(needs, str) or not (wanted := _release(needs)):
        raise ManifestError(f"The manifest asks for lichen {_shown(needs)}, which is no version.")
    if wanted > (_release(running) or (0, 0, 0)):
        raise ManifestError(
            f"The target needs lichen {needs} or newer, but this is {running}.", hint="Update lichen."
        )
    if kind not in KINDS:
        raise ManifestError(
            f"This lichen knows no target of kind {_shown(kind)}.", hint=f"It knows: {', '.join(KINDS)}."
        )
    fields = dict(custom)
    try:
        if isinstance(health := fields.get("health"), str):
            fields["health"] = msgspec.json.decode(health)
        manifest: AnyManifest = msgspec.convert(fields, type=AnyManifest)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ManifestError(f"The target's manifest is malformed: {error}.") from error
    return manifest


def make_manifest(fields: Mapping[str, Any], *, running: str) -> AnyManifest:
    """A manifest from a publisher's fields; None is left out. Raises ManifestError."""
    return read_manifest({key: value for key, value in fields.items() if value is not None}, running=running)


def custom_of(manifest: AnyManifest) -> dict[str, Any]:
    """The manifest as JSON's types, for a target's custom metadata.

    The bar of the trial is JSON within a text there, since what is signed holds no fractions (canonical
    JSON, https://wiki.laptop.org/go/Canonical_JSON).
    """
    custom: dict[str, Any] = msgspec.to_builtins(manifest)
    if manifest.health is not None:
        custom["health"] = msgspec.json.encode(manifest.health).decode()
    return {name: value for name, value in custom.items() if value is not None}


def _release(version: str) -> tuple[int, int, int] | None:
    """The release numbers of a version, without what stands after them; None if there are none.

    A development version counts as its release, since it is what will become it.
    """
    match = _VERSION.match(version)
    if match is None or not re.fullmatch(
        r"(\.?(dev|a|b|rc|post)\d+)*(\+[a-z0-9.]+)?", version[match.end() :]
    ):
        return None
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch or 0)


def _shown(value: object) -> str:
    """A foreign value for an error's sentence: short, on one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
