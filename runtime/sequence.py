"""One request as the engine sees it: tokens, options, progress, and the events that it gives back.

A `Sequence` is owned by the engine thread from submission to its last event. `tokens` holds the prompt
and everything drawn since; `computed` says how many of them are in the KV cache. Prefill and decode
are then one thing: computing tokens[computed:], and drawing a token whenever nothing is left to compute.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec

from lichen.devices.intent import Intent
from lichen.errors import LichenError, RequestError
from lichen.runtime.adaptation import PLAIN, Adaptation

if TYPE_CHECKING:
    from lichen.runtime.constraint import Constraint
    from lichen.runtime.generation import Mailbox

FinishReason = Literal["stop", "length"]
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20

LOCAL = "local"  # the owner of everything that came without an API key

_ids = itertools.count(1)


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may choose about an answer; the defaults are llama.cpp's.

    max_tokens: at most this many new tokens (None: until the context is full).
    temperature: 0 takes the likeliest token each time. top_k: 0 keeps all tokens.
    seed: the same seed, prompt and machine give the same draw; None draws a fresh one.
    stop: the answer ends before the first of these strings.
    top_logprobs: report each token's log-probability and so many of the likeliest beside it; None: neither.
    deterministic: compute alone, from an empty cache, in steps of one shape, so that a repeat is equal to
    the bit (docs/determinism.md); slower, also for others.
    speculation: whether tokens may be drafted and checked several at a time, where the daemon does that
    (docs/speculation.md); it changes the speed, not what is drawn.
    adapter_scale: how strongly the adapter counts that the model's name asks for; 0 is the model alone.
    intent: what counts for this answer beside others: latency goes ahead of them, throughput and battery
    let them go ahead, for a bounded time (`scheduler.py`, `admission.py`).
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    deterministic: bool = False
    speculation: bool = True
    adapter_scale: float = 1.0
    intent: Intent = "balanced"

    def check(self, vocab_size: int) -> None:
        """Raise RequestError naming the first field out of its range."""
        _in_range("max_tokens", self.max_tokens, 1, 1 << 31)
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_k", self.top_k, 0, 1 << 31)
        _in_range("top_p", self.top_p, 0, 1)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("adapter_scale", self.adapter_scale, -16, 16)
        _in_range("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        _in_range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"At most {MAX_STOP_STRINGS} stop strings are allowed.", param="stop")
        if any(not text or len(text) > MAX_STOP_CHARACTERS for text in self.stop):
            raise RequestError(
                f"A stop string must have 1 to {MAX_STOP_CHARACTERS} characters.", param="stop"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"At most {MAX_LOGIT_BIAS} tokens may be biased.", param="logit_bias")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"Token {token} is not in this model's vocabulary of {vocab_size}.", param="logit_bias"
                )
            _in_range("logit_bias", bias, -100, 100)


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:  # NaN fails both comparisons
        raise RequestError(f"{name} is {value}, but must be between {low:g} and {high:g}.", param=name)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one request; `cached_tokens` of the prompt came from the KV cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where one request's time went, in seconds; the rate is of tokens after the first.

    draft_n, draft_n_accepted: tokens that were drafted, and those of them that were right.
    """

    queued_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    tokens_per_second: float
    draft_n: int = 0
    draft_n_accepted: int = 0


@dataclass(slots=True, frozen=True)
class Prefill:
    """So many of the prompt's tokens are in the cache now."""

    done: int
    total: int


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """A token, its text as bytes, and its natural-log probability under the model, before any sampler option.

    `top` holds (token, bytes, logprob) of the likeliest ones, the best first.
    """

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]


@dataclass(slots=True, frozen=True)
class Piece:
    """New text; never half a character, never part of a stop string.

    tokens: those that begin within the text up to here, where log-probabilities were asked for. drafted:
    whether the token that completed it had been guessed.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    drafted: bool = False


@dataclass(slots=True, frozen=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(slots=True, frozen=True)
class Failed:
    """The answer ends here, with the reason."""

    error: LichenError


Event = Prefill | Piece | Finished | Failed


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request. `prompt` is not empty and leaves at least one cell of the context free.

    owner: whose past answers may help with drafts: the id of an API key, or LOCAL. adaptation: what it is
    computed with, from its admission to its last token. kept: whether its content may be kept to learn from.
    scored: whether some of its tokens are scored; loss: -log p of those under the model itself, in nats,
    summed over `scored_tokens`.
    """

    prompt: list[int]
    options: SamplingOptions
    mailbox: Mailbox
    constraint: Constraint | None = None
    owner: str = LOCAL
    adaptation: Adaptation = PLAIN
    kept: bool = False
    scored: bool = False
    id: int = field(default_factory=lambda: next(_ids))
    tokens: list[int] = field(init=False)
    computed: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    loss: float = 0.0
    scored_tokens: int = 0
    slot: int | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    events: list[Event] = field(default_factory=list)  # of this step, not yet posted

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that are known and not yet in the KV cache."""
        return len(self.tokens) - self.computed

    @property
    def drawn(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.prompt)

    def usage(self) -> Usage:
        """Token counts up to now."""
        return Usage(prompt_tokens=len(self.prompt), completion_tokens=self.drawn, cached_tokens=self.cached)

    def timings(self) -> Timings:
        """Times up to now."""
        now = time.perf_counter()
        first = self.first_token_at or now
        admitted = self.admitted_at or now
        decode = now - first
        return Timings(
            queued_s=admitted - self.submitted_at,
            prefill_s=first - admitted,
            decode_s=decode,
            ttft_s=first - self.submitted_at,
            tokens_per_second=(self.drawn - 1) / decode if self.drawn > 1 and decode > 0 else 0.0,
            draft_n=self.drafted,
            draft_n_accepted=self.accepted,
        )
