"""The recipe of a file: its chunks in order, and where packs keep their bytes.

A recipe comes from a mirror and is not believed: `decode` checks every number against bounds before anything
is allocated or asked for by it, and names of packs are hashes, so that no path can be smuggled in. A recipe
that passes can still lie about contents; each chunk's sha256 and then the whole file's, which the caller has
from a trusted place, find that out.

On the wire it is MessagePack: about 60 bytes a chunk, nearly all of them hashes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from lichen.errors import SourceError

VERSION = 1
MAX_RECIPE = 64 << 20  # bytes of an encoded recipe
MAX_CHUNKS = 1 << 19
MAX_CHUNK = 4 << 20  # bytes of a chunk
MAX_FILE = MAX_CHUNKS * MAX_CHUNK
MAX_PACKS = 1 << 12
MAX_STRIDE = 512  # bytes; the largest block of a tensor type has 292
HEX = re.compile(r"[0-9a-f]{64}")


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A run of a file's bytes: sha256 (32 bytes) and length in bytes."""

    sha256: bytes
    length: int


class Pack(msgspec.Struct, frozen=True, array_like=True):
    """A file of many pieces on a mirror, named by its sha256 in hex; size in bytes."""

    sha256: str
    size: int

    @property
    def path(self) -> str:
        """Where it lies, relative to the mirror."""
        return f"packs/{self.sha256}"


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """How a pack keeps one chunk.

    chunk: index into the recipe's chunks. pack: index into its packs. offset, stored: bytes within the pack.
    stride: 0 stored as it is; 1 zstd; n > 1 zstd over byte planes (byte i of every n bytes beside each
    other). base: sha256 of the chunk of equal length whose bytes must be XORed with the result; None if it
    stands alone.
    """

    chunk: int
    pack: int
    offset: int
    stored: int
    stride: int
    base: bytes | None = None


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of `size` bytes with `sha256` (hex): its chunks in order, and pieces that hold them.

    A chunk that occurs twice has pieces for its first place only. pieces are in the order of (pack, offset)
    and do not overlap. whole: the mirror also keeps the file as it is, at `whole_path`.
    """

    version: int = VERSION
    sha256: str
    size: int
    chunks: tuple[Chunk, ...]
    packs: tuple[Pack, ...] = ()
    pieces: tuple[Piece, ...] = ()
    whole: bool = False

    @property
    def whole_path(self) -> str:
        """Where a mirror keeps the file as it is."""
        return f"files/{self.sha256}"


def recipe_path(sha256: str) -> str:
    """Where a mirror keeps the recipe of the file with this sha256 in hex."""
    return f"recipes/{sha256}"


def encode(recipe: Recipe) -> bytes:
    """The recipe as MessagePack."""
    return msgspec.msgpack.encode(recipe)


def decode(data: bytes, sha256: str) -> Recipe:
    """The recipe of the file with this sha256 (hex), checked. Raises SourceError naming the first fault."""
    if len(data) > MAX_RECIPE:
        raise _unsound(f"it has {len(data)} bytes, more than {MAX_RECIPE}")
    try:
        recipe = msgspec.msgpack.decode(data, type=Recipe)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unsound(str(error).rstrip(".")) from error
    check(recipe, sha256)
    return recipe


def check(recipe: Recipe, sha256: str) -> None:
    """Whether a recipe is one of the file with this sha256 and keeps every bound. Raises SourceError."""
    if recipe.version != VERSION:
        raise SourceError(
            f"The recipe has version {recipe.version}, but this lichen reads version {VERSION}.",
            hint="Update lichen.",
        )
    if recipe.sha256 != sha256:
        raise _unsound("it is of another file")
    _check_chunks(recipe)
    _check_packs(recipe.packs)
    _check_pieces(recipe)


def _check_chunks(recipe: Recipe) -> None:
    if not HEX.fullmatch(recipe.sha256) or not 0 <= recipe.size <= MAX_FILE:
        raise _unsound(f"no file has the size {recipe.size} and the sha256 {recipe.sha256[:64]!r}")
    if len(recipe.chunks) > MAX_CHUNKS:
        raise _unsound(f"it has {len(recipe.chunks)} chunks, more than {MAX_CHUNKS}")
    lengths: dict[bytes, int] = {}
    for index, chunk in enumerate(recipe.chunks):
        if len(chunk.sha256) != 32 or not 0 < chunk.length <= MAX_CHUNK:
            raise _unsound(f"chunk {index} has {chunk.length} bytes and a hash of {len(chunk.sha256)}")
        if lengths.setdefault(chunk.sha256, chunk.length) != chunk.length:
            raise _unsound(f"chunk {index} has the hash of one with another length")
    total = sum(chunk.length for chunk in recipe.chunks)
    if total != recipe.size:
        raise _unsound(f"its chunks have {total} bytes together, but the file has {recipe.size}")


def _check_packs(packs: Sequence[Pack]) -> None:
    if len(packs) > MAX_PACKS:
        raise _unsound(f"it names {len(packs)} packs, more than {MAX_PACKS}")
    for pack in packs:
        if not HEX.fullmatch(pack.sha256) or not 0 < pack.size <= MAX_FILE:
            raise _unsound(f"it names the impossible pack {pack.sha256[:64]!r} of {pack.size} bytes")


def _check_pieces(recipe: Recipe) -> None:
    if len(recipe.pieces) > 2 * len(recipe.chunks):
        raise _unsound(f"it has {len(recipe.pieces)} pieces for {len(recipe.chunks)} chunks")
    end = (0, 0)
    for index, piece in enumerate(recipe.pieces):
        if not (0 <= piece.chunk < len(recipe.chunks) and 0 <= piece.pack < len(recipe.packs)):
            raise _unsound(f"piece {index} is of a chunk or pack that is not there")
        if not 0 <= piece.stride <= MAX_STRIDE or (piece.base is not None and len(piece.base) != 32):
            raise _unsound(f"piece {index} has an unknown form")
        length = recipe.chunks[piece.chunk].length
        plain = piece.stride == 0
        if not 0 < piece.stored <= length or (plain and piece.stored != length):
            raise _unsound(f"piece {index} keeps {length} bytes in {piece.stored}")
        if (piece.pack, piece.offset) < end or piece.offset < 0:
            raise _unsound(f"piece {index} overlaps the one before it or is out of order")
        end = (piece.pack, piece.offset + piece.stored)
        if end[1] > recipe.packs[piece.pack].size:
            raise _unsound(f"piece {index} ends after its pack")


def _unsound(what: str) -> SourceError:
    return SourceError(
        f"The recipe from the mirror is not sound: {what}.",
        hint="Publish the file again, or use another mirror.",
    )
