"""Estimates beside measured peaks, and options that shrink until they fit."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.devices.probe import memory_left
from lichen.errors import OutOfMemory
from lichen.quant.gguf_check import GGUFSummary, check_gguf
from lichen.runtime import memory
from lichen.runtime.memory import available, estimate, fit, fitted
from lichen.runtime.served_model import ModelOptions
from tests.quant.tiny_gguf import METADATA, tiny_gguf


@functools.cache
def measured(path: Path, *numbers: int) -> dict[str, int]:
    words = [sys.executable, "-m", "tests.runtime.measure_memory", str(path), *map(str, numbers)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


SETTINGS = [
    (512, 2, 64),
    (1024, 16, 256),
    *(
        pytest.param(numbers, marks=pytest.mark.slow)
        for numbers in ((256, 1, 256), (4096, 4, 256), (8192, 1, 1024))
    ),
]


@pytest.mark.parametrize("numbers", SETTINGS)
def test_the_estimate_is_near_the_peak_and_unloading_frees_it(
    model_path: Path, numbers: tuple[int, int, int]
) -> None:
    figures = measured(model_path, *numbers)
    assert figures["estimate"] == pytest.approx(figures["measured"], rel=0.15), figures
    assert figures["freed"] >= 0.95 * figures["measured"], figures


def test_a_repacked_model_is_counted_twice(model_path: Path) -> None:
    summary = check_gguf(model_path)
    options = ModelOptions(context=512, slots=1)
    assert "Q4_1" in summary.matrix_bytes
    summary = msgspec.structs.replace(summary, matrix_bytes={"Q4_1": summary.tensor_bytes})
    plain = estimate(summary, options).weights
    repacked = msgspec.structs.replace(summary, matrix_bytes={"Q4_0": summary.tensor_bytes})
    assert estimate(repacked, options).weights == plain + summary.tensor_bytes


def summary_of(tmp_path: Path, **values: tuple[int, object]) -> GGUFSummary:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(metadata=METADATA | {f"llama.{k}": v for k, v in values.items()}))
    return check_gguf(path)


def test_the_parts_of_an_estimate(tmp_path: Path) -> None:
    options = ModelOptions(context=256, slots=3)
    summary = summary_of(tmp_path, context_length=(4, 4096))
    assert estimate(summary, options).kv == 1 * 2 * (8 + 8) * 2 * 256 * 3
    assert estimate(summary, msgspec.structs.replace(options, context=257)).kv == 64 * 512 * 3
    assert estimate(summary, msgspec.structs.replace(options, context=0)).kv == 64 * 4096 * 3


def test_arrays_give_one_value_a_layer(tmp_path: Path) -> None:
    shared = [2, 0, 1] * 8
    summary = summary_of(
        tmp_path,
        context_length=(4, 4096),
        block_count=(4, 24),
        **{
            "attention.head_count_kv": (9, (4, shared)),
            "attention.key_length": (4, 16),
            "attention.value_length": (4, 32),
        },
    )
    assert estimate(summary, ModelOptions(context=256, slots=1)).kv == sum(shared) * 48 * 2 * 256


def test_slots_shrink_first_then_the_context_then_it_is_refused(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = check_gguf(model_path)
    asked = ModelOptions(context=8192, slots=4)

    def total(context: int, slots: int) -> int:
        return estimate(summary, ModelOptions(context=context, slots=slots)).total

    assert fit(summary, asked, total(8192, 4)) == asked
    two = fit(summary, asked, total(8192, 2))
    assert (two.slots, two.context) == (2, 8192)
    short = fit(summary, asked, total(4096, 1))
    assert (short.slots, short.context) == (1, 4096)
    with pytest.raises(OutOfMemory) as caught:
        fitted("small", summary, asked, total(2048, 1) - 1)
    assert caught.value.status == 507
    assert "small" in str(caught.value)
    assert f"{caught.value.needed / 1e6:,.0f} MB" in str(caught.value)
    note = fitted("small", summary, asked, total(8192, 2)).note
    assert "2 x 8,192 tokens instead of 4 x 8,192" in note
    assert note in caplog.text
    tiny = ModelOptions(context=512, slots=2)
    assert fit(summary, tiny, total(512, 1)).context == 512, "what was asked for is never made larger"
    with pytest.raises(OutOfMemory):
        fit(summary, tiny, total(256, 1))


@given(st.integers(0, 1 << 31), st.integers(0, 10_000), st.integers(1, 64))
def test_what_fits_is_within_bounds(model_summary: GGUFSummary, free: int, context: int, slots: int) -> None:
    asked = ModelOptions(context=context, slots=slots)
    try:
        chosen = fit(model_summary, asked, free)
    except OutOfMemory as error:
        assert error.needed > free
        return
    assert estimate(model_summary, chosen).total <= free
    assert 1 <= chosen.slots <= slots
    assert memory.cells(model_summary, chosen) <= memory.cells(model_summary, asked)


@pytest.fixture(scope="session")
def model_summary(model_path: Path) -> GGUFSummary:
    return check_gguf(model_path)


def test_what_is_available_obeys_the_limit() -> None:
    here = memory.resident()
    assert available(here + (64 << 20)) <= 64 << 20
    assert available(1) == 0
    assert 0 < available() < memory_left()
