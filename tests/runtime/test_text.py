"""Incremental detokenizing: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from lichen.runtime.text import TextStream


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.text(), st.lists(st.integers(min_value=0)))
def test_any_cut_gives_the_same_text_and_only_whole_characters(text: str, cuts: list[int]) -> None:
    text = text.encode("utf-8", "replace").decode()
    stream = TextStream()
    shown = [stream.feed(piece) for piece in pieces_of(text.encode(), cuts)]
    assert "".join(shown) + stream.flush() == text
    assert not any("\ufffd" in part for part in shown) or "\ufffd" in text


@given(
    st.text(alphabet="abcé", max_size=40),
    st.lists(st.text(alphabet="abcé", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(min_value=0)),
)
def test_stop_strings_end_the_text_before_the_first_of_them(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(stops)
    shown = ""
    for piece in pieces_of(text.encode(), cuts):
        shown += stream.feed(piece)
        if stream.stopped:
            break
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert stream.stopped == bool(found)
    if not found:
        assert shown + stream.flush() == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)


def test_a_stop_string_over_three_tokens_never_leaks_a_part() -> None:
    stream = TextStream(["<end>"])
    assert [stream.feed(piece) for piece in (b"ok<", b"en", b"d>more")] == ["ok", "", ""]
    assert stream.stopped


def test_what_looked_like_a_stop_string_is_shown_once_it_is_not() -> None:
    stream = TextStream(["<end>"])
    assert stream.feed(b"a<en") == "a"
    assert stream.feed(b"ough") == "<enough"
    assert not stream.stopped


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    stream = TextStream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.flush() == ""


def test_bytes_that_are_no_utf8_become_the_replacement_character() -> None:
    assert TextStream().feed(b"a\xffb") == "a\ufffdb"
