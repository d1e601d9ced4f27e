"""What a trainer is asked to do: light structs that the caller writes and the trainer's process reads."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Objective = Literal["supervised", "preference"]
Checkpoint = Literal["half", "end"]  # of the steps of a training
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Tokens = list[Annotated[int, Meta(ge=0, le=1 << 24)]]


class Example(msgspec.Struct, frozen=True, array_like=True):
    """Token ids. answer: what is taught, with its end. rejected: the worse answer of a pair, or none."""

    prompt: Annotated[Tokens, Meta(min_length=1)]
    answer: Annotated[Tokens, Meta(min_length=1)]
    rejected: Tokens = []


class Examples(msgspec.Struct, frozen=True, kw_only=True):
    """train teaches; held_out measures what was to be learned, general what was not to be lost.

    asked: general prompts that the model answers by itself before it learns, to keep its answers; where there
    are no `general` examples, a quarter of these answers measures instead. ends: tokens that end an answer.
    earlier: of lessons that the adapter already knows and is to keep.
    """

    train: Annotated[list[Example], Meta(min_length=1)]
    held_out: list[Example] = []
    general: list[Example] = []
    asked: list[Annotated[Tokens, Meta(min_length=1)]] = []
    ends: Tokens = []
    earlier: list[Example] = []


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


class Keeping(msgspec.Struct, frozen=True, kw_only=True):
    """How a training keeps what the model knows.

    weight: least weight of the divergence on general answers beside the lesson's loss; 0 keeps nothing.
    budget: most divergence on replayed answers, as a share of their loss: past it the weight grows.
    answers, earlier: general answers and examples of earlier lessons replayed in a step. length: most tokens
    of a general answer. importance: of the price on moving what answers depend on.
    """

    weight: Annotated[float, Meta(ge=0, le=1e6)] = 10.0
    budget: Annotated[float, Meta(gt=0, le=1e3)] = 0.005
    answers: Annotated[int, Meta(ge=0, le=4096)] = 2
    earlier: Annotated[int, Meta(ge=0, le=4096)] = 2
    length: Annotated[int, Meta(ge=1, le=4096)] = 48
    importance: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One training. model: path of the GGUF. output: folder that gets `<digest>/` with the adapter.

    lessons: sha256 of the file of lessons. parent: file of an adapter that this one adds to, or none.
    epochs: passes over the examples, fewer where `minutes` does not allow them. batch: examples a step.
    tokens: most that go through the model at once. rate: highest learning rate; 0 for the default of the
    objective, which `multiplier` raises or lowers. beta: how far a preference may lead away from the model as
    it was. memory: bytes that the process may allocate, 0 for no limit. cache: bytes of disk for activations.
    checkpoint: seconds between two, 0 for one after each step. measurements: how often it is measured on the
    way. prune: share by which taking out what does not pay may raise a loss; 0 takes out nothing. nice: how
    far the process steps back for others, 19 for as far as the system knows.
    """

    name: str
    model: str
    output: str
    lessons: str = ""
    lora: LoRAOptions = LoRAOptions()
    keeping: Keeping = Keeping()
    parent: str = ""
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
    prune: Annotated[float, Meta(ge=0, le=1)] = 0.0
    measurements: Annotated[int, Meta(ge=0, le=1000)] = 0
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

    base: sha256 of the model's file. before, after: `events.Measured`, in nats a token. pruned:
    `prune.Pruned`, or None where nothing was to be taken out. middle: the step after which the `middle.gguf`
    beside it was written, None where there is none.
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
    pruned: dict[str, Any] | None = None
    middle: int | None = None
