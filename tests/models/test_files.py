"""What goes wrong with files is said in words; what comes out of a model is the file again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.errors import ModelFileError, TensorError
from lichen.models.export import export_model
from lichen.models.load import load_model
from lichen.models.packing import pack
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import open_gguf, write_gguf, write_split
from lichen.runtime.scoring import NativeScorer
from tests.models.test_families import text
from tests.models.tiny_models import FAMILIES, WIDTH, write_tiny


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "no tensor blk.1.ffn_up.weight"),
        ({"blk.0.attn_q_norm.weight": None}, "no tensor blk.0.attn_q_norm.weight"),
        ({"blk.0.attn_k.weight": np.ones((8, WIDTH), np.float32)}, "has the shape .* promises"),
        ({"output_norm.weight": np.ones(3, np.float32)}, r"shape \[3\]"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((8, WIDTH), np.float32)}, "ffn_gate_exps"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_model(write_tiny(tmp_path / "m.gguf", "qwen3", tensors=tensors))


def test_qwen2_needs_its_biases(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tensor blk\.0\.attn_v\.bias"):
        load_model(write_tiny(tmp_path / "m.gguf", "qwen2", tensors={"blk.0.attn_v.bias": None}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "'longrope' is not one of"),
        ({"rope.scaling.type": 3}, "3, not a text"),
        ({"rope.freq_base": "fast"}, "'fast', not a number"),
        ({"rope.freq_base": float("nan")}, "nan, not a number"),
        ({"rope.freq_base": -1.0}, "must be above 0"),
        ({"rope.dimension_count": 8}, "8 of 32 numbers"),
        ({"attention.layer_norm_rms_epsilon": None}, "epsilon is missing"),
        ({"attention.key_length": 0}, "key_length"),
        ({"feed_forward_length": [128, 128]}, "not a whole number"),
        ({"attention.causal": False}, "encoder"),
        ({"attention.causal": 1}, "neither true nor false"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"attention.scale": 0.5}, "does not know what llama.attention.scale"),
        ({"logit_scale": 2.0, "residual_scale": 0.2}, "logit_scale, llama.residual_scale"),
    ],
)
def test_metadata_that_is_not_understood(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_model(write_tiny(tmp_path / "m.gguf", "llama", keys=keys))


def test_yarn_beside_windows_is_refused(tmp_path: Path) -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    with pytest.raises(ModelFileError, match="sliding windows"):
        load_model(write_tiny(tmp_path / "m.gguf", "gemma3", keys=keys))


@pytest.mark.parametrize("name", ["mamba", "__init__", "os.path", "../llama", "llama\n"])
def test_unknown_architectures(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as raised:
        load_model(write_tiny(tmp_path / "m.gguf", name))
    if name == "mamba":
        assert str(raised.value) == (
            "m.gguf is of the architecture 'mamba', which lichen cannot train. "
            "It can train gemma3, llama, qwen2, qwen3."
        )


@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.Q8_0, GGMLType.F16, GGMLType.F32])
def test_weights_that_are_no_numbers_name_the_tensor(kind: GGMLType, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", kind=kind)
    with open_gguf(path) as file:
        tensors = [(one.name, one.type, one.shape, one.data.copy()) for one in file.tensors.values()]
        metadata = dict(file.metadata)
    row = next(data for name, _, _, data in tensors if name == "blk.1.ffn_up.weight")[5]
    row[:4] = (0, 0x7E, 0xFF, 0x7F)  # nan as the first F16 and as F32, little endian
    write_gguf(path, metadata, tensors)
    with pytest.raises(ModelFileError, match=r"cannot be used: blk\.1\.ffn_up\.weight: Row 5 .* inf or nan"):
        load_model(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_an_untouched_model_is_the_file(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", family, kind=GGMLType.Q4_1)
    export_model(load_model(path), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def test_export_changes_only_what_was_touched(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "m.gguf", "llama", kind=GGMLType.Q8_0, tied=True))
    block = model.blocks[1]
    query, output = block.attn_q.dense(), model.output.dense()
    block.register_module("attn_q", query)
    model.register_module("output", output)
    with torch.no_grad():
        query.weight.mul_(1.5)
        block.ffn_norm.weight.add_(1)
        output.weight.mul_(2)
    export_model(model, tmp_path / "out.gguf")
    exported = load_model(tmp_path / "out.gguf")
    changed = {
        name
        for name, tensor in exported.file.tensors.items()
        if name not in model.file.tensors or not np.array_equal(tensor.data, model.file.tensors[name].data)
    }
    assert changed == {"blk.1.attn_q.weight", "blk.1.ffn_norm.weight", "output.weight"}
    assert exported.file.tensors["output.weight"].type == GGMLType.Q8_0
    with torch.no_grad():
        assert torch.allclose(exported(pack([text(20)])), model(pack([text(20)])), atol=0.2)


def test_export_to_another_type(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "m.gguf", "llama", kind=GGMLType.Q4_1))
    export_model(
        model, tmp_path / "out.gguf", choose=lambda name, kind: GGMLType.F16 if "norm" not in name else kind
    )
    exported = load_model(tmp_path / "out.gguf")
    assert exported.file.tensors["blk.0.ffn_up.weight"].type == GGMLType.F16
    assert exported.file.tensors["blk.0.ffn_norm.weight"].type == GGMLType.F32


def test_export_of_an_adapted_model_says_what_to_do(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "m.gguf", "llama"))
    model.blocks[0].register_module("attn_q", torch.nn.Sequential(model.blocks[0].attn_q))
    with pytest.raises(TensorError, match=r"blk\.0\.attn_q\.weight.*Sequential.*Merge"):
        export_model(model, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_model_in_parts_is_the_same_model(tmp_path: Path) -> None:
    """Written by lichen, read by lichen and by llama.cpp."""
    with open_gguf(write_tiny(tmp_path / "m.gguf", "llama", kind=GGMLType.Q8_0)) as file:
        tensors = [(one.name, one.type, one.shape, one.data) for one in file.tensors.values()]
        paths = write_split(tmp_path / "m.gguf", file.metadata, tensors, part_bytes=40_000)
    assert len(paths) > 2
    tokens = text(20)
    with torch.no_grad():
        whole = load_model(tmp_path / "m.gguf")(pack([tokens]))
        assert torch.equal(load_model(paths[-1])(pack([tokens])), whole)
    first, other = (native_logits(path, tokens) for path in (paths[0], tmp_path / "m.gguf"))
    assert np.array_equal(first, other)


def native_logits(path: Path, tokens: list[int]) -> Any:
    """llama.cpp's, float32 [tokens, vocabulary]."""
    scorer = NativeScorer(path, window=32, threads=1)
    try:
        return scorer.logits(tokens)
    finally:
        scorer.close()
