"""GGUF files with many tensors for tests of chunks: weights like real ones, and versions of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from tests.quant.tiny_gguf import METADATA, text, value

F16 = 1  # GGUF's number of the type
LAYERS, WIDTH, ROWS = 6, 256, 1024  # a tensor of ROWS rows in F16 has 512 KiB


def weights(seed: int = 0, layers: int = LAYERS) -> dict[str, bytes]:
    """Tensors by name, [ROWS, WIDTH] float16, normally distributed, with the embedding that a model needs."""
    random = np.random.default_rng(seed)
    names = ["token_embd.weight", *(f"blk.{layer}.ffn_up.weight" for layer in range(layers))]
    shape = (ROWS, WIDTH)
    return {name: (random.standard_normal(shape) * 0.02).astype(np.float16).tobytes() for name in names}


def nudged(tensor: bytes, amount: float, seed: int = 1) -> bytes:
    """Float16 weights after a little training: each moved by `amount` of their spread."""
    values = np.frombuffer(tensor, np.float16).astype(np.float32)
    moves = np.random.default_rng(seed).standard_normal(values.shape) * values.std() * amount
    moved: bytes = (values + moves).astype(np.float16).tobytes()
    return moved


def gguf_of(tensors: Mapping[str, bytes], template: str = "{{ messages }}") -> bytes:
    """A sound GGUF with these float16 tensors of WIDTH columns, in this order."""
    keys = {**METADATA, "llama.embedding_length": (4, WIDTH), "tokenizer.chat_template": (8, template)}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, (kind, content) in keys.items():
        header += text(key) + struct.pack("<I", kind) + value(kind, content)
    at = 0
    for name, data in tensors.items():
        header += text(name) + struct.pack("<IQQIQ", 2, WIDTH, len(data) // 2 // WIDTH, F16, at)
        at += len(data)
    return header + bytes(-len(header) % 32) + b"".join(tensors.values())
