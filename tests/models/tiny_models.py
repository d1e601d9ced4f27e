"""Random models of every family, small enough to build in milliseconds and sound enough for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lichen.quant import ggml
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import write_gguf

VOCABULARY = 320
WIDTH = 64
HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 32  # heads are wider than WIDTH / HEADS, where a family allows it
HIDDEN = 128
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
WINDOW = 24  # tokens, of gemma3

Arrays = dict[str, npt.NDArray[np.float32]]


def vocabulary() -> dict[str, Any]:
    """A sentencepiece vocabulary of bytes and made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    while len(tokens) < VOCABULARY:
        tokens.append(f"▁w{len(tokens)}")
        kinds.append(1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.arange(VOCABULARY, dtype=np.float32) * -1,
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def head_width(family: str) -> int:
    """Numbers of a head; llama.cpp wants qwen2's to be as wide as they are many."""
    return WIDTH // HEADS if family == "qwen2" else HEAD_WIDTH


def metadata(family: str, layers: int) -> dict[str, Any]:
    """Everything that lichen and llama.cpp read."""
    numbers: dict[str, Any] = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head_width(family),
        "attention.value_length": head_width(family),
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }
    if family == "gemma3":
        numbers |= {"attention.sliding_window": WINDOW, "rope.freq_base": 1000000.0}
    return {
        "general.architecture": family,
        **{f"{family}.{key}": value for key, value in numbers.items()},
        **vocabulary(),
    }


def arrays(family: str, layers: int, seed: int = 0, *, tied: bool = False) -> Arrays:
    """Random weights whose logits are far from uniform, by tensor name."""
    source = np.random.default_rng(seed)
    queries, keys = HEADS * head_width(family), KV_HEADS * head_width(family)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        numbers: npt.NDArray[np.float64] = source.standard_normal((rows, columns)) * 1.5 / columns**0.5
        return numbers.astype(np.float32)

    def vector(width: int, middle: float = 1.0) -> npt.NDArray[np.float32]:
        return (middle + 0.3 * source.standard_normal(width)).astype(np.float32)

    found: Arrays = {"token_embd.weight": matrix(VOCABULARY, WIDTH)}
    for index in range(layers):
        block: Arrays = {
            "attn_norm.weight": vector(WIDTH),
            "attn_q.weight": matrix(queries, WIDTH),
            "attn_k.weight": matrix(keys, WIDTH),
            "attn_v.weight": matrix(keys, WIDTH),
            "attn_output.weight": matrix(WIDTH, queries),
            "ffn_norm.weight": vector(WIDTH),
            "ffn_gate.weight": matrix(HIDDEN, WIDTH),
            "ffn_up.weight": matrix(HIDDEN, WIDTH),
            "ffn_down.weight": matrix(WIDTH, HIDDEN),
        }
        if family == "qwen2":
            block |= {f"attn_{name}.bias": vector(keys, 0) for name in "kv"}
            block["attn_q.bias"] = vector(queries, 0)
        if family in ("qwen3", "gemma3"):
            block |= {f"attn_{name}_norm.weight": vector(head_width(family)) for name in "qk"}
        if family == "gemma3":
            block |= {f"post_{name}_norm.weight": vector(WIDTH) for name in ("attention", "ffw")}
        found |= {f"blk.{index}.{name}": values for name, values in block.items()}
    found["output_norm.weight"] = vector(WIDTH)
    if not tied:
        found["output.weight"] = matrix(VOCABULARY, WIDTH) * 2
    return found


def write_tiny(
    path: Path,
    family: str,
    *,
    layers: int = 2,
    kind: GGMLType = GGMLType.F32,
    tied: bool = False,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[np.float32] | None] | None = None,
    seed: int = 0,
) -> Path:
    """Write a model. keys, tensors: what to replace, add, or (None) leave out."""
    values = metadata(family, layers) | {f"{family}.{key}": value for key, value in (keys or {}).items()}
    parts = arrays(family, layers, seed, tied=tied) | dict(tensors or {})
    stored = []
    for name, numbers in parts.items():
        if numbers is None:
            continue
        type_ = kind if numbers.ndim == 2 else GGMLType.F32
        rows = np.ascontiguousarray(np.atleast_2d(numbers))
        data = np.empty((rows.shape[0], ggml.row_bytes(type_, rows.shape[1])), np.uint8)
        ggml.quantize(type_, rows, data)
        stored.append((name, type_, numbers.shape, data))
    write_gguf(path, {key: value for key, value in values.items() if value is not None}, stored)
    return path
