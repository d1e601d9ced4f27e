"""Every family computes what llama.cpp computes: logits compared, over random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lichen.models.load import load_model, supported
from lichen.models.packing import pack
from lichen.quant.formats import GGMLType
from tests.models.reference import F32, Distance, distance, reference_logits
from tests.models.tiny_models import FAMILIES, HEAD_WIDTH, HEADS, VOCABULARY, WINDOW, write_tiny

LENGTH = 96  # tokens: four windows of gemma3
EXACT = 1e-5  # mean KL in nats


def text(length: int = LENGTH, seed: int = 1) -> list[int]:
    """Token ids of a made-up text."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(path: Path, tokens: list[int]) -> Tensor:
    """lichen's logits for one sequence."""
    with torch.no_grad():
        return load_model(path)(pack([tokens]))  # type: ignore[no-any-return]


def compare(path: Path, tokens: list[int] | None = None) -> Distance:
    """lichen beside llama.cpp, keys and values in float32 on both sides."""
    tokens = tokens or text()
    return distance(logits(path, tokens), reference_logits(path, tokens, kv_type=F32))


def test_every_family_is_tried() -> None:
    assert supported() == sorted(FAMILIES)


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_llama_cpp(family: str, kind: GGMLType, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", family, layers=7 if family == "gemma3" else 3, kind=kind)
    found = compare(path)
    assert found.mean <= EXACT, found
    assert found.top >= 0.98


def test_the_text_tells_models_apart(tmp_path: Path) -> None:
    """The comparison can fail: another model is far away."""
    path = write_tiny(tmp_path / "m.gguf", "llama")
    other = write_tiny(tmp_path / "o.gguf", "llama", seed=1)
    assert distance(logits(path, text()), reference_logits(other, text(), kv_type=F32)).mean > 0.1


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "the older key": ("llama", {"rope.scale_linear": 4.0}),
    "none": ("llama", {"rope.scaling.type": "none"}),
    "magnitude": ("llama", {"rope.scaling.attn_factor": 1.25}),
    "yarn": (
        "qwen2",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "yarn, interleaved": (
        "llama",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 2.5,
            "rope.scaling.original_context_length": 200,
        },
    ),
    "gemma3, scaled where it sees far": (
        "gemma3",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gemma3, local base": ("gemma3", {"rope.freq_base_swa": 3000.0}),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_variants(name: str, tmp_path: Path) -> None:
    family, keys = ROPES[name]
    layers = 7 if family == "gemma3" else 2
    path = write_tiny(tmp_path / "m.gguf", family, keys=keys, layers=layers)
    plain = write_tiny(tmp_path / "p.gguf", family, layers=layers)
    assert compare(path).mean <= EXACT
    if name != "none":
        assert distance(logits(plain, text()), logits(path, text())).mean > 100 * EXACT


def test_factors_a_frequency(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD_WIDTH // 2, dtype=np.float32)
    path = write_tiny(tmp_path / "m.gguf", "llama", tensors={"rope_freqs.weight": factors})
    assert compare(path).mean <= EXACT


def test_tied_embeddings_share_one_tensor(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", tied=True)
    model = load_model(path)
    assert model.output.tensor is model.token_embd.tensor
    assert compare(path).mean <= EXACT


def test_optional_biases_are_used(tmp_path: Path) -> None:
    bias = np.linspace(-1, 1, HEAD_WIDTH * HEADS, dtype=np.float32)
    path = write_tiny(tmp_path / "m.gguf", "llama", tensors={"blk.1.attn_q.bias": bias})
    assert load_model(path).blocks[1].attn_q.bias is not None
    assert compare(path).mean <= EXACT


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_the_window_ends_where_it_should(length: int, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "gemma3", layers=6)
    assert compare(path, text(length)).mean <= EXACT


@pytest.mark.parametrize(
    "keys", [{"attention.sliding_window_pattern": 2}, {"attention.sliding_window": None}]
)
def test_patterns_of_windows(keys: dict[str, Any], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "gemma3", layers=4, keys=keys)
    assert compare(path).mean <= EXACT


def test_capped_logits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "gemma3", keys={"final_logit_softcapping": 3.0})
    assert logits(path, text()).abs().max() <= 3
    assert compare(path).mean <= EXACT
