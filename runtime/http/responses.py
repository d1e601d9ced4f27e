"""Answers of the routes as types. They document: `openapi.py` makes JSON schemas of them.

The routes build plain dictionaries, which is faster for each token; a test holds every kind of answer to
these types. A field that may be missing has UNSET as its default; one that may be null says None.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from lichen.runtime.resident import ModelStatus


class ErrorBody(Struct, kw_only=True):
    """What went wrong, in one sentence. param: the field that it is about; code: for programs."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Struct):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


class PromptTokensDetails(Struct):
    """Of the prompt's tokens, those that were in the KV cache already."""

    cached_tokens: int


class UsageBody(Struct, kw_only=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TimingsBody(Struct, kw_only=True):
    """lichen's own: where one answer's time went, in milliseconds; the rate is of tokens after the first.

    draft_n, draft_n_accepted: tokens that were drafted, and those of them that were right.
    """

    queued_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    tokens_per_second: float
    cached_tokens: int
    draft_n: int
    draft_n_accepted: int


class AdapterBody(Struct, kw_only=True):
    """lichen's own: the adapter that an answer was made with, by its digest, and how strongly it counted."""

    sha256: str
    scale: float


class Head(Struct, kw_only=True):
    """What begins every answer and every chunk. created: seconds since 1970."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    adapter: AdapterBody | UnsetType = UNSET


class CalledFunction(Struct):
    """A call as the model made it; `arguments` is JSON text."""

    name: str
    arguments: str


class AnswerCall(Struct, kw_only=True):
    """One call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Struct, kw_only=True):
    """The model's message; `content` is null where it only makes calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnswerCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class FunctionDelta(Struct, kw_only=True):
    """What a chunk adds to a call: first its name, then pieces of its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(Struct, kw_only=True):
    """What a chunk adds to one of the calls; `id` stands where it begins."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class LikelyToken(Struct, kw_only=True):
    """A token that could have stood here. bytes: of its text, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken, kw_only=True):
    """A token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Struct, kw_only=True):
    """Log-probabilities of the tokens of a message."""

    content: list[ChosenToken]
    refusal: None


class TextLogprobs(Struct, kw_only=True):
    """Log-probabilities of the tokens of a text; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class ChatChoice(Struct, kw_only=True):
    """One answer to a conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatChunkChoice(Struct, kw_only=True):
    """A part of one answer; `finish_reason` stands in the last."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatCompletion(Head, kw_only=True):
    """Answer of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageBody
    timings: TimingsBody


class ChatCompletionChunk(Head, kw_only=True):
    """One event of a streamed chat completion. `usage` is there only if it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    timings: TimingsBody | UnsetType = UNSET


class TextChoice(Struct, kw_only=True):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextChunkChoice(Struct, kw_only=True):
    """A part of one continuation; `finish_reason` stands in the last."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(Head, kw_only=True):
    """Answer of `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageBody
    timings: TimingsBody


class CompletionChunk(Head, kw_only=True):
    """One event of a streamed completion. `usage` is there only if it was asked for."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    timings: TimingsBody | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    """One model. context_length: tokens; created: seconds since 1970. Of one with an adapter, base is the
    model's name and adapter the digest of the version that serves, null after a rollback to none."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    architecture: str
    sha256: str
    size: int
    loaded: bool
    context_length: int | UnsetType = UNSET
    capabilities: list[str]
    base: str | UnsetType = UNSET
    adapter: str | UnsetType | None = UNSET


class EmbeddingUsage(Struct):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, kw_only=True):
    """The vector of one input: numbers, or base64 of its little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Struct, kw_only=True):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    adapter: AdapterBody | UnsetType = UNSET


class TokenPiece(Struct):
    """A token and its text, or its bytes where they are no whole text."""

    id: int
    piece: str | list[int]


class TokenList(Struct):
    """Answer of `POST /tokenize`: ids, or with `with_pieces` their texts too."""

    tokens: list[int | TokenPiece]


class TokenText(Struct):
    """Answer of `POST /detokenize`."""

    content: str


class PromptText(Struct):
    """Answer of `POST /apply-template`."""

    prompt: str


class ModelList(Struct, kw_only=True):
    """The models that can answer now."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(Struct):
    """Whether requests are answered: only in the state `ok`, with the HTTP status 200."""

    status: Literal["loading", "ok", "draining", "failed"]


class Version(Struct):
    """Versions of lichen and of the llama.cpp bindings."""

    version: str
    llama_cpp: str


class SlotsStatus(Struct):
    """Answers that can be computed at the same time, and that are."""

    total: int | UnsetType = UNSET
    busy: int | UnsetType = UNSET


class QueueStatus(Struct):
    """Requests that wait for a slot, and how many may."""

    waiting: int | UnsetType = UNSET
    limit: int | UnsetType = UNSET


class KVStatus(Struct):
    """Tokens in the KV cache, and how many it can hold."""

    cells_used: int | UnsetType = UNSET
    cells_total: int | UnsetType = UNSET


class Status(Struct, kw_only=True):
    """What runs now; slots, queue, kv and counters are sums over the models that are loaded."""

    version: str
    pid: int
    uptime_s: float
    state: Literal["loading", "ok", "draining", "failed"]
    rss_bytes: int
    tasks: int
    available_bytes: int
    models: list[ModelStatus]
    slots: SlotsStatus | UnsetType = UNSET
    queue: QueueStatus | UnsetType = UNSET
    kv: KVStatus | UnsetType = UNSET
    counters: dict[str, float] | UnsetType = UNSET


class ModelState(Struct, kw_only=True):
    """Answer of `POST /models/load`; with `stream` a line, before which others tell the progress, 0 to 1."""

    status: str
    model: ModelStatus | UnsetType = UNSET
    progress: float | UnsetType = UNSET


class Unloaded(Struct, kw_only=True):
    """Answer of `POST /models/unload`."""

    status: Literal["unloaded"]
    model: str
    freed_bytes: int
