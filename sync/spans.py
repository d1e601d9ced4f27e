"""Which bytes to ask for: the missing chunks' pieces, chosen and joined into few ranges. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

import msgspec

from lichen.sync.recipe import Chunk, Piece, Recipe

GAP = 16 << 10  # bytes between two pieces that are fetched and dropped rather than asked around
SPAN = 4 << 20  # bytes of a range, unless one piece is longer


class Want(msgspec.Struct, frozen=True):
    """One chunk and where its stored form lies in a file of the mirror; see recipe.Piece."""

    chunk: Chunk
    offset: int
    stored: int
    stride: int = 0
    base: bytes | None = None


class Span(msgspec.Struct, frozen=True):
    """A range of a mirror's file, from the first want's beginning to the last one's end."""

    path: str
    wants: tuple[Want, ...]

    @property
    def start(self) -> int:
        """Its first byte."""
        return self.wants[0].offset

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.wants[-1].offset + self.wants[-1].stored


def from_packs(
    recipe: Recipe, missing: Set[bytes], usable: Callable[[bytes, bytes], bool]
) -> dict[str, list[Want]]:
    """The smallest usable piece of each missing chunk that has one, by path and in order of offset.

    usable: whether the difference of a chunk (first sha256) to a base (second) can be applied.
    """
    best: dict[bytes, Piece] = {}
    for piece in recipe.pieces:
        sha256 = recipe.chunks[piece.chunk].sha256
        if sha256 not in missing or (piece.base is not None and not usable(sha256, piece.base)):
            continue
        if sha256 not in best or piece.stored < best[sha256].stored:
            best[sha256] = piece
    wants: dict[str, list[Want]] = {}
    for piece in sorted(best.values(), key=lambda piece: (piece.pack, piece.offset)):
        want = Want(recipe.chunks[piece.chunk], piece.offset, piece.stored, piece.stride, piece.base)
        wants.setdefault(recipe.packs[piece.pack].path, []).append(want)
    return wants


def from_whole(recipe: Recipe, missing: Set[bytes], path: str | None) -> dict[str, list[Want]]:
    """The missing chunks as they lie in the file itself, which a mirror has at `path` (None: nowhere)."""
    wants, at, seen = [], 0, set()
    for chunk in recipe.chunks:
        if chunk.sha256 in missing and chunk.sha256 not in seen:
            seen.add(chunk.sha256)
            wants.append(Want(chunk, at, chunk.length))
        at += chunk.length
    return {path: wants} if wants and path is not None else {}


def joined(path: str, wants: Iterable[Want]) -> list[Span]:
    """Wants in order of offset as ranges: neighbours together, as far as SPAN and GAP allow."""
    spans: list[list[Want]] = []
    for want in wants:
        if spans:
            first, last = spans[-1][0], spans[-1][-1]
            near = want.offset - (last.offset + last.stored) <= GAP
            if near and want.offset + want.stored - first.offset <= SPAN:
                spans[-1].append(want)
                continue
        spans.append([want])
    return [Span(path, tuple(each)) for each in spans]
