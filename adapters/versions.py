"""What the registry of adapters holds, as values: versions with their lineage, and what serves."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Any

import msgspec

import lichen

ROLLED_BACK = "rolled back"  # kind of a note
BASE = ""  # in a name's history: the model alone, without an adapter


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where an adapter comes from. base: sha256 of the model's file that it was trained over, hex.

    lessons: ids of the journal's records and of files. lessons_sha256: of all lessons together. options: the
    hyper-parameters, as the trainer's task has them. scores: what the training measured, before and after.
    parent: digest of the version that it goes on from.
    """

    base: str
    base_name: str = ""
    lessons: tuple[str, ...] = ()
    lessons_sha256: str = ""
    options: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    parent: str | None = None
    lichen: str = lichen.__version__
    torch: str = ""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One immutable version of an adapter. digest: sha256 of its GGUF, hex. size: of that file in bytes.

    created: seconds since 1970. ranks: of each adapted tensor, by the model's name for it. heads: the
    model's, of queries and of keys.
    """

    version: int = 1  # of this form
    name: str
    digest: str
    size: int
    created: float
    lineage: Lineage
    architecture: str
    alpha: float
    ranks: dict[str, int]
    heads: tuple[int, int] = (0, 0)

    @property
    def parameters(self) -> tuple[int, int]:
        """Adapted layers, and the largest rank among them."""
        return len(self.ranks), max(self.ranks.values())


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was found or decided about a version: numbers that a gate saw, a rollback and why."""

    kind: str
    at: float = msgspec.field(default_factory=time.time)
    values: dict[str, Any] = {}


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What serves under a name. history: digests that were promoted, the active one last; BASE for the model
    alone, to which the first promotion can be rolled back. tainted: digests of versions that learned from
    something that was to be forgotten, and since when.
    """

    version: int = 1
    base: str = ""
    history: tuple[str, ...] = ()
    tainted: dict[str, float] = {}

    @property
    def active(self) -> str | None:
        """The digest that serves; None for the model alone, or where nothing was promoted yet."""
        return self.history[-1] or None if self.history else None

    def before(self, there: Container[str]) -> tuple[str, ...]:
        """The history that a rollback would leave: without the active one, and without versions that are
        tainted or not `there` any more; BASE where no other is left."""
        left = (digest for digest in self.history[:-1] if digest == BASE or digest in there)
        return tuple(digest for digest in left if digest not in self.tainted) or (BASE,)

    @property
    def kept(self) -> frozenset[str]:
        """The active one and the one before it, which a rollback needs."""
        return frozenset(self.history[-2:]) - {BASE}


class LayerChange(msgspec.Struct, frozen=True, kw_only=True):
    """How one layer differs between two versions. a, b: Frobenius norms of what each adds to the weights,
    None where it has no adapter there; distance: norm of the difference.
    """

    layer: str
    a: float | None
    b: float | None
    distance: float


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What two versions have not in common. options and scores: pairs of the values that differ, by name."""

    a: str
    b: str
    lessons_added: tuple[str, ...]
    lessons_removed: tuple[str, ...]
    options: dict[str, tuple[Any, Any]]
    scores: dict[str, tuple[Any, Any]]
    layers: tuple[LayerChange, ...]
