"""Stored forms of chunks: what goes in comes out, and a bomb does not go off."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lichen.errors import SourceError
from lichen.sync.pieces import pack, pack_delta, unpack
from tests.sync.weights import nudged, weights

TENSOR = weights(layers=0)["token_embd.weight"]


@given(st.binary(min_size=1, max_size=500), st.integers(1, 1 << 12), st.sampled_from([1, 2, 18, 20, 34, 256]))
def test_what_is_packed_comes_back(seed: bytes, times: int, block: int) -> None:
    data = (seed * times)[: 1 << 16]
    stored, stride = pack(data, block)
    assert len(stored) <= len(data)
    assert unpack(stored, stride, len(data)) == data


@given(st.binary(min_size=1, max_size=4096), st.integers(0, 255), st.sampled_from([1, 2, 20]))
def test_a_difference_and_its_base_give_the_chunk(data: bytes, change: int, block: int) -> None:
    base = bytes([data[0] ^ change]) + data[1:]
    delta = pack_delta(data, base, block, alone=1 << 20)
    assert delta is not None
    assert unpack(*delta, len(data), base) == data


def test_the_smallest_form_is_kept() -> None:
    noise = np.random.default_rng(0).bytes(1 << 16)
    assert pack(noise, 1) == (noise, 0)
    halves, stride = pack(TENSOR, 2)
    assert stride == 2
    assert len(halves) < 0.9 * len(TENSOR)
    assert pack_delta(noise, bytes(1 << 16), 1, alone=1 << 16) is None
    delta = pack_delta(nudged(TENSOR, 1e-3), TENSOR, 2, alone=len(halves))
    assert delta is not None
    assert len(delta[0]) < 0.5 * len(halves)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    with pytest.raises(SourceError, match="does not say"):
        unpack(bomb, 1, 1000)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    with pytest.raises(SourceError):
        unpack(silent, 1, 1 << 20)


def test_a_frame_that_lies_about_its_size() -> None:
    honest = zstandard.ZstdCompressor().compress(bytes(range(256)) * 16)
    at = honest.index((4096 - 256).to_bytes(2, "little"))  # the header keeps sizes of two bytes less 256
    lying = honest[:at] + (100).to_bytes(2, "little") + honest[at + 2 :]
    assert zstandard.get_frame_parameters(lying).content_size == 356
    with pytest.raises(SourceError):
        unpack(lying, 1, 356)


@pytest.mark.parametrize("stride", [0, 1, 7])
def test_damaged_pieces_are_errors_for_people(stride: int) -> None:
    good, _ = pack(b"lichen" * 1000, 1)
    for stored in (b"", good[:-3], good + b"more", good * 2, b"x" * 50):
        with pytest.raises(SourceError):
            unpack(stored, stride, 6000)
    with pytest.raises(SourceError):
        unpack(good, 1, 6000, base=b"too short")
