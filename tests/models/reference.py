"""llama.cpp's logits for a text, and how far others are from them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lichen.runtime import native

F32, F16 = 0, 1  # ggml's numbers, for the types of keys and values


def reference_logits(
    path: Path, tokens: list[int], *, kv_type: int = F16, adapter: Path | None = None
) -> Tensor:
    """Logits float32 [tokens, vocabulary] of one sequence, computed by llama.cpp in one batch.

    adapter: file of a LoRA adapter that is applied.
    """
    model = native.Model(path)
    lib = model._lib
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = len(tokens)
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    params.type_k = params.type_v = kv_type
    params.flash_attn_type = int(kv_type == F16)  # llama.cpp's flash attention would round F32 to F16
    params.swa_full = True
    context = lib.llama_init_from_model(model._pointer, params)
    assert context, "llama.cpp refused the context"
    if adapter is not None:
        lora = lib.llama_adapter_lora_init(model._pointer, str(adapter).encode())
        assert lora, "llama.cpp refused the adapter"
        pointers, scales = (type(lora) * 1)(lora), (ctypes.c_float * 1)(1.0)
        assert lib.llama_set_adapters_lora(context, pointers, 1, scales) == 0
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = 1
        assert lib.llama_decode(context, batch) == 0
        logits: Any = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), model.vocab_size))
        return torch.from_numpy(logits.copy())
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        model.close()


@dataclass(frozen=True)
class Distance:
    """Mean and largest KL divergence over the positions, in nats; share of positions with one top token."""

    mean: float
    worst: float
    top: float


def distance(ours: Tensor, reference: Tensor) -> Distance:
    """KL(reference || ours), computed in float64 a part at a time."""
    kl = []
    for ours_part, reference_part in zip(torch.split(ours, 64), torch.split(reference, 64), strict=True):
        log_p = reference_part.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - ours_part.double().log_softmax(-1))).sum(-1))
    values = torch.cat(kl)
    same = (ours.argmax(-1) == reference.argmax(-1)).double().mean()
    return Distance(float(values.mean()), float(values.max()), float(same))
