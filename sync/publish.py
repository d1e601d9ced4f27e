"""Publishing a file to a mirror: a folder that any static file server or object store can offer.

    recipes/<sha256 of the file>   which chunks it is made of, and where they are (recipe.py)
    packs/<sha256 of the pack>     the stored forms of chunks, one after the other, without any header
    files/<sha256 of the file>     the file as it is: for clients without packs, and when packs are gone

Invariants: what lies under a name never changes; a recipe appears after everything that it names. A chunk
that any recipe of the mirror already places is not stored again. Publishing the same file twice changes
nothing. Not covered: removing old versions; one publisher at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from lichen.errors import SourceError, StoreError
from lichen.sync.chunking import Cut, cut
from lichen.sync.download import write_error
from lichen.sync.pieces import pack, pack_delta
from lichen.sync.recipe import Chunk, Pack, Piece, Recipe, decode, encode, recipe_path

THREADS = 2
AHEAD = 8  # chunks being packed or waiting to be written


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _Packed(msgspec.Struct, frozen=True):
    """A chunk with what has to be stored of it: (bytes, stride, base), the form that stands alone first."""

    chunk: Chunk
    forms: tuple[tuple[bytes, int, bytes | None], ...]


class _Source(msgspec.Struct, frozen=True):
    """Where a chunk is kept: the pack (None: the one that is being written) and the piece in it."""

    pack: Pack | None
    piece: Piece


def publish_file(path: Path, mirror: Path, *, previous: Path | None = None, whole: bool = True) -> Recipe:
    """Put a file on the mirror under the folder `mirror`; returns its recipe. Blocks.

    previous: an older version of it that devices have: chunks then get a difference to it where that is
    smaller. whole: also keep the file as it is (a hard link where the file system allows it). Raises
    StoreError for a file or folder that cannot be read or written.
    """
    for folder in ("recipes", "packs", "files"):
        (mirror / folder).mkdir(parents=True, exist_ok=True)
    known = _known(mirror)
    older = _Older(previous) if previous is not None else None
    cuts = cut(path)
    staged = mirror / "packs" / f"new-{os.getpid()}"
    try:
        with path.open("rb") as file, staged.open("wb") as target:
            writer, digest = _Writer(target, known), hashlib.sha256()
            for packed in _packed(file, cuts, known, older, digest):
                writer.add(packed)
            target.flush()
            os.fsync(target.fileno())
        recipe = writer.recipe(digest.hexdigest(), whole=whole)
        if writer.size:
            staged.replace(mirror / writer.pack().path)
        if whole:
            _keep_whole(path, mirror / recipe.whole_path)
        _write(mirror / recipe_path(recipe.sha256), encode(recipe))
        return recipe
    except OSError as error:
        raise write_error(staged, error) from error
    finally:
        staged.unlink(missing_ok=True)


def _known(mirror: Path) -> dict[bytes, list[_Source]]:
    """Every chunk that the mirror's recipes place in packs that are there."""
    known: dict[bytes, list[_Source]] = {}
    for path in sorted((mirror / "recipes").iterdir()):
        try:
            recipe = decode(path.read_bytes(), path.name)
        except SourceError:
            continue  # of another version, or no recipe: it is left alone
        there = [(mirror / each.path).is_file() for each in recipe.packs]
        for piece in recipe.pieces:
            if there[piece.pack]:
                sources = known.setdefault(recipe.chunks[piece.chunk].sha256, [])
                if all(piece.base != other.piece.base for other in sources):
                    sources.append(_Source(recipe.packs[piece.pack], piece))
    return known


class _Older:
    """The chunks of an older version by their place in a tensor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places = {each.label: each for each in cut(path) if each.label is not None}

    def find(self, wanted: Cut) -> bytes | None:
        """The bytes at the same place, if there are as many."""
        place = self._places.get(wanted.label) if wanted.label is not None else None
        if place is None or (place.length, place.block) != (wanted.length, wanted.block):
            return None
        with self._path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.length)


def _packed(
    file: BinaryIO, cuts: Sequence[Cut], known: dict[bytes, list[_Source]], older: _Older | None, whole: _Hash
) -> Iterator[_Packed]:
    """The chunks in order, packed on threads (hashing, zstd and numpy leave the GIL), a bounded number ahead.

    whole: is given all bytes of the file.
    """

    def work(data: bytes, each: Cut) -> _Packed:
        digest = hashlib.sha256(data).digest()
        chunk = Chunk(digest, each.length)
        forms: list[tuple[bytes, int, bytes | None]] = []
        sources = known.get(digest, [])
        if not any(source.piece.base is None for source in sources):
            forms.append((*pack(data, each.block), None))
        base = older.find(each) if older is not None and digest not in known else None
        if base is not None and base != data:
            alone = len(forms[0][0])
            delta = pack_delta(data, base, each.block, alone)
            if delta is not None:
                forms.append((*delta, hashlib.sha256(base).digest()))
        return _Packed(chunk, tuple(forms))

    with ThreadPoolExecutor(THREADS, "pack") as threads:
        waiting: deque[Future[_Packed]] = deque()
        for each in cuts:
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
            data = file.read(each.length)
            if len(data) != each.length:
                raise StoreError(f"{file.name} became shorter while it was read.")
            waiting.append(threads.submit(work, data, each))
            whole.update(data)
        while waiting:
            yield waiting.popleft().result()


class _Writer:
    """Writes new pieces one after the other and collects the recipe."""

    def __init__(self, target: BinaryIO, known: dict[bytes, list[_Source]]) -> None:
        self._target, self._known = target, known
        self._digest = hashlib.sha256()
        self._chunks: list[Chunk] = []
        self._seen: set[bytes] = set()
        self._sources: list[_Source] = []
        self.size = 0

    def add(self, packed: _Packed) -> None:
        """The next chunk: its pieces are written unless an equal chunk has them already."""
        index, digest = len(self._chunks), packed.chunk.sha256
        self._chunks.append(packed.chunk)
        if digest in self._seen:
            return
        self._seen.add(digest)
        for source in self._known.get(digest, []):
            piece = msgspec.structs.replace(source.piece, chunk=index)
            self._sources.append(_Source(source.pack, piece))
        for data, stride, base in packed.forms:
            self._sources.append(_Source(None, Piece(index, 0, self.size, len(data), stride, base)))
            self._target.write(data)
            self._digest.update(data)
            self.size += len(data)

    def pack(self) -> Pack:
        """The pack that was written."""
        return Pack(self._digest.hexdigest(), self.size)

    def recipe(self, sha256: str, *, whole: bool) -> Recipe:
        """The recipe of the file, whose sha256 in hex is given."""
        packs: dict[Pack, int] = {}
        pieces = []
        for source in self._sources:
            index = packs.setdefault(source.pack or self.pack(), len(packs))
            pieces.append(msgspec.structs.replace(source.piece, pack=index))
        return Recipe(
            sha256=sha256,
            size=sum(chunk.length for chunk in self._chunks),
            chunks=tuple(self._chunks),
            packs=tuple(packs),
            pieces=tuple(sorted(pieces, key=lambda piece: (piece.pack, piece.offset))),
            whole=whole,
        )


def _keep_whole(path: Path, target: Path) -> None:
    if target.is_file():
        return
    staged = target.with_name(f"new-{os.getpid()}")
    staged.unlink(missing_ok=True)
    try:
        os.link(path, staged)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, staged)
    staged.replace(target)


def _write(path: Path, data: bytes) -> None:
    staged = path.parent.parent / f"new-{os.getpid()}"
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
