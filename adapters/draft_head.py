"""The draft head: a small network that guesses a model's next tokens from its last hidden state.

    z_0 = A h + a                                           h: the model's last hidden state
    z_j = z_(j-1) + D silu(W [rms(z_(j-1)); T[x_j]] + w)    x_1: the token drawn from h, then the guesses
    U z_j + b                                               logits of the token that follows x_j

One step is used for every further position, as in EAGLE (arXiv 2401.15077) and Hydra (arXiv 2402.05109),
but without attention: h has read the text already. Guesses are of `words` only, the tokens that are used
most; the last row of T stands for all others. This is the numpy half, which needs no torch; one vector or a
batch of them go through the same code. `distil.py` trains the same network.

A file is a GGUF with these matrices in F16 and, in its metadata, what the head is for: the sha256 of the
model's file, and the size of its vocabulary. It is untrusted input: nothing of it is used before all of it
was checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from lichen.errors import ModelFileError
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFFile, GGUFTensor, open_gguf, write_gguf
from lichen.quant.gguf_write import TensorItem

Floats: TypeAlias = npt.NDArray[np.float32]
Whole: TypeAlias = npt.NDArray[np.int64]

KIND = "draft-head"
VERSION = 1
EPSILON = 1e-6
MAX_WIDTH = 1 << 14  # of a hidden state, and of what the head computes with
MAX_WORDS = 1 << 16
MAX_BYTES = 1 << 29
_DTYPES: dict[GGMLType, np.dtype[Any]] = {
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.F32: np.dtype(np.float32),
}


class HeadFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a head is for and where it comes from. base: sha256 of the model's file, hex. vocabulary: its
    tokens. tokens: that it was trained on, over all trainings. steps: likewise. acceptance: share of guesses
    that were right by position, given those before, on held-out text."""

    base: str
    vocabulary: int
    tokens: int = 0
    steps: int = 0
    acceptance: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class HeadWeights:
    """float32, with R words, hidden states of width H, the head's own width d and inner width m.

    words: int64 [R], token ids. A: [d, H], a: [d]. W: [m, 2 d], w: [m]. D: [d, m]. T: [R + 1, d].
    U: [R, d], b: [R].
    """

    words: Whole
    a_weight: Floats
    a_bias: Floats
    w_weight: Floats
    w_bias: Floats
    d_weight: Floats
    table: Floats
    output: Floats
    output_bias: Floats


_TENSORS = (
    "a_weight", "a_bias", "w_weight", "w_bias", "d_weight", "table", "output", "output_bias"
)  # fmt: skip


class DraftHead:
    """Ready to guess. Immutable, so it may be read from any thread."""

    def __init__(self, facts: HeadFacts, weights: HeadWeights) -> None:
        self.facts = facts
        self.weights = weights
        self.words = weights.words
        width = weights.d_weight.shape[0]
        self._rows = np.full(facts.vocabulary, len(self.words), np.int64)
        self._rows[self.words] = np.arange(len(self.words))
        self._inner = np.ascontiguousarray(weights.w_weight[:, :width])  # [m, d]
        # The token's half of the inner product is a lookup: [R + 1, m].
        self._seen = weights.table @ weights.w_weight[:, width:].T + weights.w_bias

    @property
    def hidden(self) -> int:
        """Width of the hidden states that it reads."""
        return int(self.weights.a_weight.shape[1])

    def rows(self, tokens: npt.ArrayLike) -> Whole:
        """The rows [...] of token ids among the words; R for those that are none."""
        return np.asarray(self._rows[np.asarray(tokens)])

    def begin(self, states: Floats) -> Floats:
        """z_0 [..., d] of hidden states [..., H] float32."""
        return np.asarray(states @ self.weights.a_weight.T + self.weights.a_bias)

    def advance(self, z: Floats, rows: Any) -> Floats:
        """z_j [..., d] of z_(j-1) and the row (of `rows`) of the token x_j."""
        scale = np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + np.float32(EPSILON))
        inner = (z / scale) @ self._inner.T + self._seen[rows]
        with np.errstate(over="ignore"):  # exp of a large number: the quotient is 0 then, as it should be
            inner = inner / (1 + np.exp(-inner))
        return np.asarray(z + inner @ self.weights.d_weight.T)

    def logits(self, z: Floats) -> Floats:
        """[..., R] of z_j."""
        return np.asarray(z @ self.weights.output.T + self.weights.output_bias)

    def guess(self, state: Floats, token: int, k: int, least: float) -> tuple[list[int], list[float]]:
        """At most k tokens that may follow `token`, which was drawn from `state` [H], and the head's own
        probability that each of them and all before are right; it ends before that falls below `least`."""
        z, row = self.begin(state), int(self._rows[token])
        tokens: list[int] = []
        chances: list[float] = []
        chance = 1.0
        while len(tokens) < k:
            z = self.advance(z, row)
            logits = self.logits(z)
            row = int(logits.argmax())
            chance /= float(np.exp(logits - logits[row]).sum())
            if chance < least:
                break
            tokens.append(int(self.words[row]))
            chances.append(chance)
        return tokens, chances


def write_head(path: Path, head: DraftHead) -> None:
    """Write a head; its file appears whole. Raises what `write_gguf` does."""
    facts, weights = head.facts, head.weights
    metadata: dict[str, Any] = {
        "general.type": KIND,
        "general.architecture": KIND,
        "lichen.head.version": VERSION,
        "lichen.base.sha256": facts.base,
        "lichen.head.vocabulary": facts.vocabulary,
        "lichen.head.tokens": facts.tokens,
        "lichen.head.steps": facts.steps,
        "lichen.head.words": weights.words.astype(np.int32),
        "lichen.head.acceptance": np.asarray(facts.acceptance, np.float32),
    }
    tensors: list[TensorItem] = []
    for name in _TENSORS:
        values = getattr(weights, name)
        kind = GGMLType.F32 if values.ndim == 1 else GGMLType.F16
        tensors.append((name, kind, values.shape, np.ascontiguousarray(values, _DTYPES[kind])))
    write_gguf(path, metadata, tensors)


def read_head(path: Path, *, base: str, vocabulary: int, hidden: int) -> DraftHead:
    """Read a head and check that it is one for this model. Raises ModelFileError that says what is wrong."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ModelFileError(f"{path.name} has {path.stat().st_size:,} bytes, too many for a draft head.")
    with open_gguf(path, model=False) as file:
        facts = _facts(file, path.name)
        if facts.base != base:
            raise ModelFileError(
                f"The draft head {path.name} was made for another model ({facts.base[:12]}…).",
                hint="Make one for this model with 'lichen distil'.",
            )
        if facts.vocabulary != vocabulary:
            raise ModelFileError(
                f"{path.name} is a draft head for {facts.vocabulary:,} tokens; the model has {vocabulary:,}."
            )
        head = DraftHead(facts, _weights(file, path.name, vocabulary))
    if head.hidden != hidden:
        raise ModelFileError(f"{path.name} reads states of {head.hidden} numbers; the model has {hidden}.")
    return head


def _facts(file: GGUFFile, name: str) -> HeadFacts:
    values = {key: value.content for key, value in file.metadata.items()}
    if values.get("general.type") != KIND:
        raise ModelFileError(f"{name} is no draft head.")
    if (version := values.get("lichen.head.version")) != VERSION:
        raise ModelFileError(f"{name} is a draft head of version {version!r}; this lichen reads {VERSION}.")
    acceptance = values.get("lichen.head.acceptance", ())
    found = {
        "base": values.get("lichen.base.sha256"),
        "vocabulary": values.get("lichen.head.vocabulary"),
        "tokens": values.get("lichen.head.tokens", 0),
        "steps": values.get("lichen.head.steps", 0),
        "acceptance": acceptance.tolist() if isinstance(acceptance, np.ndarray) else acceptance,
    }
    try:
        return msgspec.convert(found, HeadFacts)
    except msgspec.ValidationError as error:
        raise ModelFileError(f"{name} does not say for which model it is: {error}.") from error


def _weights(file: GGUFFile, name: str, vocabulary: int) -> HeadWeights:
    words = file.metadata["lichen.head.words"].content if "lichen.head.words" in file.metadata else None
    if not isinstance(words, np.ndarray) or words.dtype.kind not in "iu" or not 0 < len(words) <= MAX_WORDS:
        raise ModelFileError(f"{name} has no list of words, or too long a one.")
    words = words.astype(np.int64)
    if words.min() < 0 or words.max() >= vocabulary or len(np.unique(words)) != len(words):
        raise ModelFileError(f"{name} has words twice, or words that the model does not have.")
    missing = [tensor for tensor in _TENSORS if tensor not in file.tensors]
    if missing:
        raise ModelFileError(f"{name} has no tensor {missing[0]}.")
    found = {tensor: file.tensors[tensor] for tensor in _TENSORS}
    _check_shapes(found, len(words), name)
    return HeadWeights(words=words, **{tensor: _numbers(found[tensor], name) for tensor in _TENSORS})


def _check_shapes(found: Mapping[str, GGUFTensor], words: int, name: str) -> None:
    width, hidden = _pair(found["a_weight"].shape)
    inner = found["w_bias"].shape[0]
    if not all(0 < size <= MAX_WIDTH for size in (width, hidden, inner)):
        raise ModelFileError(f"{name} has the widths {hidden}, {width} and {inner}, which no head has.")
    expected: dict[str, Sequence[int]] = {
        "a_weight": (width, hidden),
        "a_bias": (width,),
        "w_weight": (inner, 2 * width),
        "w_bias": (inner,),
        "d_weight": (width, inner),
        "table": (words + 1, width),
        "output": (words, width),
        "output_bias": (words,),
    }
    for tensor, shape in expected.items():
        if found[tensor].shape != tuple(shape):
            raise ModelFileError(
                f"{name}: {tensor} has the shape {list(found[tensor].shape)}, not {list(shape)}."
            )


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def _numbers(tensor: GGUFTensor, name: str) -> Floats:
    if tensor.type not in _DTYPES:
        raise ModelFileError(f"{name}: {tensor.name} is {tensor.type.name}, not F16 or F32.")
    stored = np.ascontiguousarray(tensor.data).view(_DTYPES[tensor.type]).reshape(tensor.shape)
    numbers = np.asarray(stored, np.float32)
    if not np.isfinite(numbers).all():
        raise ModelFileError(f"{name}: {tensor.name} holds values that are no numbers.")
    return numbers
