"""Recipes: what a good one says, and every way in which one can lie."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.errors import SourceError
from lichen.sync.recipe import MAX_CHUNK, Chunk, Pack, Piece, Recipe, decode, encode

SHA = "ab" * 32
ONE, TWO = b"1" * 32, b"2" * 32
GOOD = Recipe(
    sha256=SHA,
    size=350,
    chunks=(Chunk(ONE, 100), Chunk(TWO, 150), Chunk(ONE, 100)),
    packs=(Pack("cd" * 32, 400),),
    pieces=(Piece(0, 0, 0, 100, 0), Piece(1, 0, 100, 80, 20), Piece(1, 0, 180, 10, 2, ONE)),
    whole=True,
)


def test_a_recipe_comes_back_as_it_was() -> None:
    assert decode(encode(GOOD), SHA) == GOOD
    assert decode(encode(Recipe(sha256=SHA, size=0, chunks=())), SHA).chunks == ()


def with_piece(**changes: Any) -> dict[str, Any]:
    return {"pieces": (msgspec.structs.replace(GOOD.pieces[0], **changes), *GOOD.pieces[1:])}


LIES: list[tuple[dict[str, Any], str]] = [
    ({"sha256": "ef" * 32}, "another file"),
    ({"version": 2}, "version 2"),
    ({"size": 351}, "together"),
    ({"size": -1}, "no file has"),
    ({"chunks": (Chunk(ONE, 350 - (1 << 40)), Chunk(TWO, 1 << 40))}, "chunk 0"),
    ({"chunks": (Chunk(ONE, MAX_CHUNK + 1),)}, "chunk 0"),
    ({"chunks": (Chunk(b"short", 350),)}, "hash of 5"),
    ({"chunks": (Chunk(ONE, 100), Chunk(ONE, 250))}, "another length"),
    ({"packs": (Pack("../../etc/passwd", 400),)}, "impossible pack"),
    ({"packs": (Pack("CD" * 32, 400),)}, "impossible pack"),
    ({"packs": (Pack("cd" * 32 + "\n", 400),)}, "impossible pack"),
    ({"packs": (Pack("cd" * 32, 1 << 62),)}, "impossible pack"),
    ({"packs": (Pack("cd" * 32, 189),)}, "after its pack"),
    ({"packs": (GOOD.packs[0],) * 5000}, "5000"),
    ({"packs": ()}, "not there"),
    ({"pieces": GOOD.pieces * 3}, "9 pieces"),
    (with_piece(chunk=3), "not there"),
    (with_piece(chunk=-1), "not there"),
    (with_piece(pack=-1), "not there"),
    (with_piece(offset=-1), "out of order"),
    (with_piece(offset=1), "overlaps"),
    (with_piece(stored=99), "keeps 100 bytes in 99"),
    (with_piece(stored=101, stride=1), "in 101"),
    (with_piece(stored=0, stride=1), "in 0"),
    (with_piece(stride=100_000), "unknown form"),
    (with_piece(base=b"x"), "unknown form"),
    ({"pieces": GOOD.pieces[::-1]}, "overlaps"),
]


@pytest.mark.parametrize(("changes", "fault"), LIES)
def test_a_lie_is_named(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(SourceError, match=fault):
        decode(encode(msgspec.structs.replace(GOOD, **changes)), SHA)


def test_bytes_that_are_no_recipe() -> None:
    huge_count = b"\x86\xa6chunks\xdd\xff\xff\xff\xff"  # an array of 4 billion items that are not there
    deep = b"\x91" * 100_000
    extra = msgspec.msgpack.encode({**msgspec.to_builtins(GOOD), "path": "/etc"})
    for data in (b"", b"\xc1", b"[]", encode(GOOD)[:-1], huge_count, deep, extra, bytes(65 << 20)):
        with pytest.raises(SourceError):
            decode(data, SHA)


@given(st.data())
def test_no_mutation_does_more_than_be_refused(data: st.DataObject) -> None:
    encoded = bytearray(encode(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        recipe = decode(bytes(encoded), SHA)
    except SourceError:
        return
    assert sum(chunk.length for chunk in recipe.chunks) == recipe.size
