"""A small, sound GGUF, written by hand so that each of its bytes can be made to lie."""

from __future__ import annotations

import struct
from typing import Any

TOKENS = ["<s>", "</s>", "a", "b"]
WIDTH = 32


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """A typed metadata value: 4 uint32, 6 float32, 8 text, 9 (item kind, items)."""
    if kind == 8:
        return text(content)
    if kind == 9:
        item_kind, items = content
        body = b"".join(value(item_kind, item) for item in items)
        return struct.pack("<IQ", item_kind, len(items)) + body
    return struct.pack({4: "<I", 5: "<i", 6: "<f", 7: "<B"}[kind], content)


METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (8, "llama"),
    "llama.block_count": (4, 1),
    "llama.context_length": (4, 64),
    "llama.embedding_length": (4, WIDTH),
    "llama.attention.head_count": (4, 4),
    "llama.attention.head_count_kv": (4, 2),
    "tokenizer.ggml.tokens": (9, (8, TOKENS)),
    "tokenizer.ggml.token_type": (9, (5, [3, 3, 1, 1])),
    "tokenizer.ggml.bos_token_id": (4, 0),
}


def tiny_gguf(
    *,
    metadata: dict[str, tuple[int, Any]] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: list[tuple[str, list[int], int, int]] | None = None,
    tensor_count: int | None = None,
    key_count: int | None = None,
    data_bytes: int = 4096,
) -> bytes:
    """The file; each argument replaces a part of it, sound or not. tensors: name, shape, type, offset."""
    keys = METADATA if metadata is None else metadata
    if tensors is None:
        tensors = [("token_embd.weight", [WIDTH, 4], 0, 0), ("output_norm.weight", [WIDTH], 0, WIDTH * 16)]
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    for key, (kind, content) in keys.items():
        header += text(key) + struct.pack("<I", kind) + value(kind, content)
    for name, shape, kind, offset in tensors:
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        header += struct.pack("<IQ", kind, offset)
    return header + bytes(-len(header) % 32) + bytes(data_bytes)
