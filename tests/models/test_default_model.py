"""The default model beside llama.cpp on real text.

With F16 weights both sides multiply the same numbers, and what remains is rounding: llama.cpp rounds
activations, keys and values to F16. With the Q4_1 file llama.cpp also quantizes the activations of every
product to 8 bits, which lichen does not: training sees the weights as they are, not that noise.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lichen.models.export import export_model
from lichen.models.load import load_model
from lichen.models.packing import pack
from lichen.quant.formats import BLOCKS, GGMLType
from lichen.runtime import native
from tests.conftest import ROOT
from tests.models.reference import Distance, distance, reference_logits

DATA = Path(os.environ.get("LICHEN_DATA", ROOT.parent / "shared" / "data"))
SHORT = """The file stays where it is; only the pages that are read come into memory, and every process that
maps it has the same ones. A layer turns a few rows into numbers, multiplies, and lets them go. So a model of
a hundred megabytes trains in little more than its own size, on the machine of the person it belongs to.
"""


def tokens_of(path: Path, text: str, count: int) -> list[int]:
    model = native.Model(path)
    try:
        tokens = model.tokenize(text, special=False, add_bos=False)
    finally:
        model.close()
    assert len(tokens) >= count
    return tokens[:count]


def shakespeare() -> str:
    path = DATA / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set LICHEN_DATA")
    return path.read_text(encoding="utf-8")[:12000]


def compare(path: Path, tokens: list[int]) -> Distance:
    with torch.no_grad():
        ours = load_model(path)(pack([tokens]))
    return distance(ours, reference_logits(path, tokens))


@pytest.fixture(scope="module")
def as_f16(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with every quantized tensor stored as F16, by our own writer."""
    path = tmp_path_factory.mktemp("f16") / "model.gguf"

    def choose(_name: str, kind: GGMLType) -> GGMLType:
        return GGMLType.F16 if BLOCKS[kind][0] > 1 else kind

    export_model(load_model(model_path), path, choose=choose)
    return path


def test_short_text_f16(as_f16: Path) -> None:
    found = compare(as_f16, tokens_of(as_f16, SHORT * 4, 256))
    assert found.mean <= 1e-5, found
    assert found.top >= 0.99


def test_short_text_as_it_is(model_path: Path) -> None:
    found = compare(model_path, tokens_of(model_path, SHORT * 4, 256))
    assert found.mean <= 5e-3, found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_long_text_f16(as_f16: Path) -> None:
    found = compare(as_f16, tokens_of(as_f16, shakespeare(), 2048))
    assert found.mean <= 1e-5, found
    assert found.top >= 0.995


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_long_text_as_it_is(model_path: Path) -> None:
    found = compare(model_path, tokens_of(model_path, shakespeare(), 2048))
    assert found.mean <= 5e-3, found


def test_a_copy_is_the_file(model_path: Path, tmp_path: Path) -> None:
    export_model(load_model(model_path), tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == model_path.read_bytes()
