"""The memory governor: what a model will take, what may be taken, and how to make the one fit the other.

An estimate is made from a file's header alone, before anything is loaded. Its parts are sums that follow
from llama.cpp's own allocations, and a few constants that were fitted to measured peaks (docs/log.md):

    weights   the tensors as mapped from the file, a second copy of what is repacked for the processor,
              and the tables of the vocabulary
    kv        layers x key and value heads x lengths x bytes of a number x cells; sliding windows are taken
              for full ones, so that it is an upper bound there
    compute   activations of one batch, its attention mask, the logits of every slot and draft, the graph

What is measured is the resident set of this process (anonymous, file mapped and shared pages). Mapped
weights count in it although the system may drop them. Not covered: memory of a GPU, pages in swap.
"""

from __future__ import annotations

import functools
import logging
import platform
from pathlib import Path
from typing import Any

import msgspec

from lichen.devices import probe
from lichen.errors import OutOfMemory
from lichen.quant.gguf_check import GGUFArray, GGUFSummary, check_gguf
from lichen.runtime.served_model import ModelOptions

log = logging.getLogger("lichen.memory")

LEAST_CONTEXT = 2048  # tokens; a shorter conversation is of little use, so no model is shrunk below it
MARGIN_SHARE, MARGIN_MOST = 0.05, 512 << 20  # of the machine's memory and in bytes: left to everyone else
DEFAULT_SHARE = 0.8  # of the machine's memory, where no limit is configured

_CELLS_STEP = 256  # llama.cpp rounds the cells of a slot up to a multiple of this
_F16, _F32 = 2, 4  # bytes
_KV_BITS = {"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5}  # of a number, with the scales of its block
_REPACKED = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"})  # ggml's repack.cpp, on AVX2 and Arm
_REPACKED_ON_ARM = frozenset({"Q5_K", "Q6_K", "Q8_0"})

# Fitted to SmolLM2-135M (llama.cpp of bindings 0.3.36, x86-64): contexts of 256 to 8,192 tokens, 1 to 16
# slots, batches of 64 to 1,024 tokens.
_VOCABULARY_ENTRY = 184  # bytes a token or merge: text, hash tables
_WIDTHS, _INNER_WIDTHS = 7, 2  # activations alive at once: of the model's width, of the feed-forward's
_HEAD = 50_000_000  # bytes of a draft head as it is computed with, and of rows that wait to be collected
_GRAPH_LAYER = 85_000  # bytes a layer: nodes of the graph and their bookkeeping
_CANDIDATE = 12  # bytes a vocabulary entry while a token is drawn


class MemoryEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What one loaded model takes at its peak, in bytes."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.compute


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """Options that fit, what they take, and a sentence if they are less than was asked for."""

    options: ModelOptions
    estimate: MemoryEstimate
    note: str = ""


def estimate(summary: GGUFSummary, options: ModelOptions) -> MemoryEstimate:
    """What a model would take with these options, its draft model included. Raises what `check_gguf` does
    for the file of a draft model."""
    batch = max(options.batch, options.slots)
    context = cells(summary, options)
    width, layers = _number(summary, "embedding_length"), _number(summary, "block_count")
    inner = max(_per_layer(summary, "feed_forward_length", default=4 * width))
    tokens = _length(summary, "tokens")
    repacked = _REPACKED | (_REPACKED_ON_ARM if platform.machine() in ("aarch64", "arm64") else frozenset())
    activations = _F32 * batch * (_WIDTHS * width + _INNER_WIDTHS * inner)
    mask = _F16 * batch * context
    logits = _F32 * tokens * options.outputs
    whole = MemoryEstimate(
        weights=summary.tensor_bytes
        + sum(size for kind, size in summary.matrix_bytes.items() if kind in repacked)
        + _VOCABULARY_ENTRY * (tokens + _length(summary, "merges")),
        kv=(cell_bytes(summary, options.kv_type) * context + _state_bytes(summary)) * options.slots,
        compute=activations + mask + logits + _GRAPH_LAYER * layers + _CANDIDATE * tokens,
    )
    if options.speculation.heads:
        whole = msgspec.structs.replace(whole, compute=whole.compute + _HEAD)
    draft = options.speculation.draft_model if options.speculation.thinks else None
    if draft is None:
        return whole
    alone = msgspec.structs.replace(options, speculation=type(options.speculation)())
    added = estimate(_summary(draft), alone)
    return MemoryEstimate(
        weights=whole.weights + added.weights,
        kv=whole.kv + added.kv,
        compute=whole.compute + added.compute,
    )


@functools.lru_cache(maxsize=4)
def _summary(path: Path) -> GGUFSummary:
    return check_gguf(path)


def cells(summary: GGUFSummary, options: ModelOptions) -> int:
    """Tokens that each slot really holds: never more than trained for, rounded as llama.cpp does."""
    trained = summary.context_train or 1 << 20
    return -(-min(options.context or trained, trained) // _CELLS_STEP) * _CELLS_STEP


def fit(summary: GGUFSummary, options: ModelOptions, free: int) -> ModelOptions:
    """The options, shrunk until the estimate is within `free` bytes: slots first, then the context.

    Slots stay at least 1 and the context 2,048 tokens (or what was trained or asked for, if that is less).
    Raises OutOfMemory with both numbers when even that does not fit.
    """
    for slots in range(options.slots, 0, -1):
        fewer = msgspec.structs.replace(options, slots=slots)
        if estimate(summary, fewer).total <= free:
            return fewer
    one = msgspec.structs.replace(options, slots=1)
    full = cells(summary, one)
    least = min(LEAST_CONTEXT, options.context or full, summary.context_train or full)
    for context in range(full - _CELLS_STEP, least - 1, -_CELLS_STEP):
        shorter = msgspec.structs.replace(one, context=context)
        if estimate(summary, shorter).total <= free:
            return shorter
    smallest = msgspec.structs.replace(one, context=least)
    needed = estimate(summary, smallest).total
    if needed <= free:
        return smallest
    raise OutOfMemory(f"This model with one slot of {least:,} tokens", needed, free)


def fitted(name: str, summary: GGUFSummary, options: ModelOptions, free: int) -> Fitted:
    """As `fit`, with the estimate; a shrink is logged. Raises OutOfMemory that names the model."""
    try:
        chosen = fit(summary, options, free)
    except OutOfMemory as error:
        raise OutOfMemory(f"{name} with one slot and the shortest context", error.needed, free) from error
    note = ""
    if chosen != options:
        asked = estimate(summary, options).total
        note = (
            f"{name} got {chosen.slots} x {cells(summary, chosen):,} tokens instead of {options.slots} x "
            f"{cells(summary, options):,}: that needs {asked / 1e6:,.0f} MB, "
            f"and {free / 1e6:,.0f} MB are free."
        )
        log.warning("%s", note)
    return Fitted(options=chosen, estimate=estimate(summary, chosen), note=note)


def available(limit: int = 0) -> int:
    """Bytes that this process may still take, at least 0.

    The least of: what the machine and the cgroup have left, minus a margin for everyone else; and what is
    left of `limit` (0: 80 % of the machine's memory) beyond the resident set of this process.
    """
    total = _memory_total()
    margin = int(min(MARGIN_SHARE * total, MARGIN_MOST))
    cap = limit or int(DEFAULT_SHARE * total)
    return max(0, min(probe.memory_left() - margin, cap - resident()))


def resident() -> int:
    """Resident set of this process in bytes: anonymous, file mapped and shared pages."""
    return int(_process().memory_info().rss)


@functools.cache
def _process() -> Any:
    import psutil

    return psutil.Process()


@functools.cache
def _memory_total() -> int:
    return probe.probe().memory_total


def cell_bytes(summary: GGUFSummary, kv_type: str = "f16") -> int:
    """Bytes of one token's keys and values over all layers; layers without attention have 0 heads."""
    heads = _per_layer(summary, "attention.head_count")
    shared = _per_layer(summary, "attention.head_count_kv", default=max(heads))
    length = _number(summary, "embedding_length") // max(1, *heads)
    key = _number(summary, "attention.key_length", length)
    value = _number(summary, "attention.value_length", length)
    return int(_KV_BITS[kv_type] * (key + value) * sum(shared) / 8)


def _state_bytes(summary: GGUFSummary) -> int:
    """Bytes of one sequence's state in recurrent layers (Mamba and its hybrids)."""
    inner, state = _number(summary, "ssm.inner_size"), _number(summary, "ssm.state_size")
    groups, kernel = _number(summary, "ssm.group_count"), _number(summary, "ssm.conv_kernel", 1)
    layers = _number(summary, "block_count")
    return _F32 * layers * ((kernel - 1) * (inner + 2 * groups * state) + state * inner)


def _number(summary: GGUFSummary, key: str, default: int = 0) -> int:
    found = summary.metadata.get(f"{summary.architecture}.{key}", default)
    return found if isinstance(found, int) else default


def _per_layer(summary: GGUFSummary, key: str, default: int = 0) -> list[int]:
    """A value for each layer, whether the file gives one for all or an array."""
    layers = _number(summary, "block_count")
    found = summary.metadata.get(f"{summary.architecture}.{key}", default)
    if isinstance(found, GGUFArray) and found.items is not None:
        return [max(0, int(item)) for item in found.items] or [default]
    return [found if isinstance(found, int) else default] * max(1, layers)


def _length(summary: GGUFSummary, key: str) -> int:
    found = summary.metadata.get(f"tokenizer.ggml.{key}")
    return found.length if isinstance(found, GGUFArray) else 0
