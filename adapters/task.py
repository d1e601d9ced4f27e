"""What a trainer is asked to do: light structs that the caller writes and the trainer's process reads."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Objective = Literal["supervised", "preference"]
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Tokens = list[Annotated[int, Meta(ge=0, le=1 << 24)]]


class Example(msgspec.Struct, frozen=True, array_like=True):
    """Token ids. answer: what is taught, with its end. rejected: the worse answer of a pair, or none."""

    prompt: Annotated[Tokens, Meta(min_length=1)]
    answer: Annotated[Tokens, Meta(min_length=1)]
    rejected: Tokens = []


class Examples(msgspec.Struct, frozen=True, kw_only=True):
    """train teaches; held_out measures what was to be learned, general what was not to be lost."""

    train: Annotated[list[Example], Meta(min_length=1)]
    held_out: list[Example] = []
    general: list[Example] = []


class LoRAOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The form of an adapter: W + scale B A with A [rank, inputs] and B [outputs, rank].

    alpha: scale is alpha / rank, or with `rank_stabilized` alpha / sqrt(rank) (rsLoRA, Kalajdzievski, 2023,
    arXiv:2312.03732). first: the lowest block that is adapted; None for the upper half, which trained 1.8
    times faster here than all of them.
    """

    rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 16.0
    targets: tuple[str, ...] = LINEARS
    first: Annotated[int, Meta(ge=0)] | None = None
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return float(self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank))


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One training. model: path of the GGUF. output: folder that gets `<digest>/` with the adapter.

    lessons: sha256 of the file of lessons. epochs: passes over the examples, fewer where `minutes` does not
    allow them. batch: examples a step. tokens: most that go through the model at once. rate: highest
    learning rate; 0 for the default of the objective, which `multiplier` raises or lowers. beta: how far a
    preference may lead away from the model as it was. memory: bytes that the process may allocate, 0 for no
    limit. cache: bytes of disk for activations. checkpoint: seconds between two, 0 for one after each step.
    nice: how far the process steps back for others, 19 for as far as the system knows.
    """

    name: str
    model: str
    output: str
    lessons: str = ""
    lora: LoRAOptions = LoRAOptions()
    objective: Objective = "supervised"
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 3
    minutes: Annotated[float, Meta(gt=0, le=1e5)] | None = None
    batch: Annotated[int, Meta(ge=1, le=4096)] = 8
    tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    multiplier: Annotated[float, Meta(gt=0, le=100)] = 1.0
    beta: Annotated[float, Meta(gt=0, le=100)] = 0.1
    seed: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)] = 0
    threads: Annotated[int, Meta(ge=1, le=512)] = 1
    memory: Annotated[int, Meta(ge=0)] = 0
    cache: Annotated[int, Meta(ge=0)] = 2_000_000_000
    checkpoint: Annotated[float, Meta(ge=0)] = 20.0
    nice: Annotated[int, Meta(ge=0, le=19)] = 19

    def identity(self, examples: bytes) -> str:
        """Hex digest of all that decides the result; a checkpoint of another one is not continued.

        How often a checkpoint is written, memory and priority do not belong to it; the cache does,
        since an example that does not fit is computed alone, which rounds differently.
        """
        decisive = msgspec.structs.replace(self, output="", memory=0, checkpoint=0.0, nice=0)
        digest = hashlib.sha256(msgspec.json.encode(decisive, order="deterministic"))
        digest.update(hashlib.sha256(examples).digest())
        return digest.hexdigest()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What `adapter.json` beside an adapter says: what it is, from what, and what was measured.

    base: sha256 of the model's file. before, after: `events.Measured`, in nats a token.
    """

    version: int = 1
    name: str
    sha256: str
    base: str
    task: Task
    first: int
    steps: int
    rate: float
    before: dict[str, Any]
    after: dict[str, Any]
    lichen: str
    torch: str
