"""Adapters in PEFT's form: back and forth without loss; PEFT itself computes what torch and the engine do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.adapters.compare import read_factors
from lichen.adapters.peft_file import CONFIG, WEIGHTS, read_peft, write_peft
from lichen.errors import AdapterError
from lichen.quant.adapter_check import check_adapter
from tests.adapters.made_adapters import write_made
from tests.models.tiny_models import FAMILIES, HEADS, HIDDEN, KV_HEADS, VOCABULARY, WIDTH, arrays, write_tiny


def exported(folder: Path, family: str, **options: Any) -> tuple[Path, Path, Path]:
    """A model, an adapter for it, and that adapter as PEFT has it."""
    model = write_tiny(folder / "m.gguf", family)
    adapter = write_made(folder / "a.gguf", model, 1, blocks=range(2), general_architecture=family, **options)
    heads = check_adapter(adapter, model).heads
    assert heads == (HEADS, KV_HEADS)
    write_peft(adapter, folder / "peft", heads=heads, base_name="tiny")
    return model, adapter, folder / "peft"


@pytest.mark.parametrize("family", FAMILIES)
def test_back_and_forth_is_the_same_adapter(family: str, tmp_path: Path) -> None:
    model, adapter, folder = exported(tmp_path, family)
    back = read_peft(folder, tmp_path / "back.gguf", model=model)
    check_adapter(back, model)
    before, after = read_factors(adapter), read_factors(back)
    assert before.keys() == after.keys()
    for name, factors in before.items():
        assert np.array_equal(factors.a, after[name].a)
        np.testing.assert_allclose(factors.b * factors.scale, after[name].b * after[name].scale, rtol=1e-6)


def changed(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def test_scales_of_other_forms_are_folded_in(tmp_path: Path) -> None:
    model, adapter, folder = exported(tmp_path, "llama")
    changed(folder, use_rslora=True, lora_alpha=6, alpha_pattern={"0.self_attn.q_proj": 2.0})
    after = read_factors(read_peft(folder, tmp_path / "back.gguf", model=model))
    for name, factors in read_factors(adapter).items():
        alpha = 2.0 if name == "blk.0.attn_q.weight" else 6.0
        np.testing.assert_allclose(
            after[name].b * after[name].scale, factors.b * alpha / factors.a.shape[0] ** 0.5, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "this one has IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": 0}, "not as PEFT writes it"),
        ({"r": 9}, "has the rank 4"),
        ({"lora_alpha": "x"}, "not as PEFT writes it"),
        ({"rank_pattern": {"q_proj": -1}}, "not as PEFT writes it"),
    ],
)
def test_what_lichen_does_not_serve_is_said(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, _, folder = exported(tmp_path, "llama")
    changed(folder, **fields)
    with pytest.raises(AdapterError, match=words):
        read_peft(folder, tmp_path / "back.gguf", model=model)


def tensor(name: str, shape: tuple[int, ...], kind: Any = np.float32) -> dict[str, Any]:
    return {name: np.zeros(shape, kind)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (tensor("base_model.model.lm_head.lora_A.weight", (4, 64)), "do not fit each other"),
        (
            tensor("base_model.model.model.layers.0.self_attn.q_proj.weight", (4, 64)),
            "no part of a plain LoRA",
        ),
        (tensor("x.lora_A.weight", (4, 64), np.int32), "not a matrix"),
        (tensor("x.lora_A.weight", (4, 64, 1)), "not a matrix"),
        (
            tensor("x.mlp.lora_A.weight", (4, 64)) | tensor("x.mlp.lora_B.weight", (64, 4)),
            "none of a block's linear layers",
        ),
    ],
)
def test_tensors_that_are_no_lora_of_a_block_are_refused(
    tensors: dict[str, Any], words: str, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    model, _, folder = exported(tmp_path, "llama")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=words):
        read_peft(folder, tmp_path / "back.gguf", model=model)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b'\x08\0\0\0\0\0\0\0{"a": 1}', b"{}" * 99])
def test_files_that_are_no_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    model, _, folder = exported(tmp_path, "llama")
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match="no sound safetensors"):
        read_peft(folder, tmp_path / "back.gguf", model=model)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        read_peft(folder, tmp_path / "back.gguf", model=model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, which are not ours to mend
def test_peft_computes_what_torch_and_the_engine_do(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    from lichen.adapters.lora import attach
    from lichen.adapters.lora_file import read_adapter
    from lichen.adapters.task import LoRAOptions
    from lichen.models.load import load_model
    from lichen.models.packing import pack
    from tests.models.reference import F32, reference_logits

    model, adapter, folder = exported(tmp_path, "llama")
    tokens = torch.randint(3, VOCABULARY, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
        tie_word_embeddings=False,
    )
    base: Any = LlamaForCausalLM(config)
    base.load_state_dict({name: torch.from_numpy(part) for name, part in checkpoint().items()})
    base.eval()
    with torch.no_grad():
        plain = base(torch.tensor([tokens])).logits[0]
        adapted = PeftModel.from_pretrained(base, folder)(torch.tensor([tokens])).logits[0]
    ours = load_model(model)
    options = LoRAOptions(rank=4, alpha=4, first=0)
    attach(ours, options)
    read_adapter(ours, adapter)
    with torch.no_grad():
        theirs = ours(pack([tokens])).reshape(len(tokens), -1)
    engine = reference_logits(model, tokens, kv_type=F32, adapter=adapter)
    assert (plain - adapted).abs().max() > 0.5, "it changes much"
    assert (adapted - theirs).abs().max() < 2e-3
    assert (adapted - engine).abs().max() < 2e-2


def checkpoint() -> dict[str, Any]:
    """The tiny model's weights as Hugging Face names and orders them."""
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    found: dict[str, Any] = {}
    for name, part in arrays("llama", 2).items():
        stem = name.removesuffix(".weight")
        numbers = part
        if stem in whole:
            found[f"{whole[stem]}.weight"] = numbers
            continue
        _, block, layer = stem.split(".")
        if layer in ("attn_q", "attn_k"):  # pairs of neighbours become pairs half a head apart
            heads = HEADS if layer == "attn_q" else KV_HEADS
            numbers = part.reshape(heads, -1, 2, WIDTH).swapaxes(1, 2).reshape(part.shape)
        found[f"model.layers.{block}.{names[layer]}.weight"] = np.ascontiguousarray(numbers)
    return found
