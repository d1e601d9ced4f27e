"""What a distillation is asked to do, and what it found: light structs for both sides."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from lichen.quant.gguf_check import check_gguf

Size = Annotated[int, Meta(ge=1, le=1 << 16)]


class DistilTask(msgspec.Struct, frozen=True, kw_only=True):
    """One training of a draft head.

    model: path of the GGUF; base: its sha256, hex. states: folder of segments; segments: names of those
    that are used, the oldest first. start: the head to go on from, or none. output: path of the new head.
    words, width, inner: R, d and m of `draft_head.py`, where there is no head to go on from. positions: how
    far ahead is learned. steps: at most; minutes: fewer steps where they do not fit. held_out: share of the
    newest tokens that only measure. step_s: seconds of a plain step of the model. threads, memory,
    checkpoint: as in `task.Task`.
    """

    model: str
    base: str
    states: str
    segments: tuple[str, ...]
    output: str
    start: str = ""
    words: Size = 4096
    width: Size = 256
    inner: Size = 1024
    positions: Annotated[int, Meta(ge=1, le=8)] = 4
    steps: Annotated[int, Meta(ge=1, le=1 << 20)] = 2000
    minutes: Annotated[float, Meta(gt=0, le=1e5)] | None = None
    batch: Annotated[int, Meta(ge=1, le=1 << 16)] = 256
    rate: Annotated[float, Meta(gt=0, le=1)] = 2e-3
    held_out: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    step_s: Annotated[float, Meta(gt=0, le=1e3)] = 0.01
    seed: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)] = 0
    threads: Annotated[int, Meta(ge=1, le=512)] = 1
    memory: Annotated[int, Meta(ge=0)] = 0
    checkpoint: Annotated[float, Meta(ge=0)] = 20.0

    def identity(self) -> str:
        """Hex digest of all that decides the result; a checkpoint of another one is not continued."""
        decisive = msgspec.structs.replace(self, output="", memory=0, checkpoint=0.0, step_s=1.0)
        return hashlib.sha256(msgspec.json.encode(decisive, order="deterministic")).hexdigest()


def model_sizes(model: Path) -> tuple[int, int]:
    """Width of a model's hidden states, and its tokens. Raises ModelFileError."""
    metadata = check_gguf(model).metadata
    hidden = metadata[f"{metadata['general.architecture']}.embedding_length"]
    tokens = metadata["tokenizer.ggml.tokens"]
    return int(hidden), len(tokens) if isinstance(tokens, tuple) else tokens.length
