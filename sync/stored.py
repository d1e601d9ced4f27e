"""Chunks inside the files that the store already has, read where they lie: no byte is kept twice.

`recipes/<sha256>` in the store says how a blob divides into chunks. It is only a note: where it is missing or
cannot be read, the blob is cut again (about a second a gigabyte), and each chunk is hashed when it is read,
so a blob that rotted gives no wrong bytes, only none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lichen.errors import SourceError, StoreError
from lichen.sync.chunking import cut
from lichen.sync.recipe import HEX, Chunk, Recipe, decode, encode
from lichen.sync.store import Store


def keep(store: Store, recipe: Recipe) -> None:
    """Note the chunks of a blob, without where packs have them."""
    path = _note(store, recipe.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    staged.write_bytes(encode(Recipe(sha256=recipe.sha256, size=recipe.size, chunks=recipe.chunks)))
    staged.replace(path)


class StoredChunks:
    """Where the wanted chunks lie in the store's blobs. Making it reads or writes notes: it blocks."""

    def __init__(self, store: Store, wanted: set[bytes]) -> None:
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        for blob in _blobs(store):
            at = 0
            for chunk in _chunks(store, blob):
                if chunk.sha256 in wanted:
                    self._places.setdefault(chunk.sha256, (blob, at, chunk.length))
                at += chunk.length
        _prune(store)

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._places

    def read(self, sha256: bytes) -> bytes | None:
        """The bytes of a chunk; None if it is not here any more. Blocks."""
        if sha256 not in self._places:
            return None
        path, offset, length = self._places[sha256]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(length)
        except OSError:
            data = b""
        if hashlib.sha256(data).digest() == sha256:
            return data
        del self._places[sha256]
        return None


def _blobs(store: Store) -> Iterator[Path]:
    folder = store.root / "blobs" / "sha256"
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if HEX.fullmatch(path.name))


def _chunks(store: Store, blob: Path) -> tuple[Chunk, ...]:
    try:
        recipe = decode(_note(store, blob.name).read_bytes(), blob.name)
        if recipe.size == blob.stat().st_size:
            return recipe.chunks
    except (OSError, SourceError):
        pass
    try:
        recipe = divide(blob)
    except (OSError, StoreError):
        return ()
    keep(store, recipe)
    return recipe.chunks


def divide(blob: Path) -> Recipe:
    """The chunks of a blob (a file named by its sha256). Raises OSError, StoreError. Blocks."""
    chunks = []
    with blob.open("rb") as file:
        for each in cut(blob):
            data = file.read(each.length)
            chunks.append(Chunk(hashlib.sha256(data).digest(), len(data)))
    return Recipe(sha256=blob.name, size=sum(chunk.length for chunk in chunks), chunks=tuple(chunks))


def _prune(store: Store) -> None:
    """Remove the notes of blobs that are gone."""
    folder = store.root / "recipes"
    for note in folder.iterdir() if folder.is_dir() else ():
        if not store.blob(note.name).is_file():
            note.unlink(missing_ok=True)


def _note(store: Store, sha256: str) -> Path:
    return store.root / "recipes" / sha256
