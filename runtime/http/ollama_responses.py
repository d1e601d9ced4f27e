"""Answers of Ollama's routes as types, for the OpenAPI document; see `responses.py`."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from lichen.runtime.http.responses import AdapterBody


class ErrorText(Struct):
    """Every answer of these routes with a status of 400 or more."""

    error: str


class OllamaFunctionCall(Struct):
    """A call; `arguments` is an object."""

    name: str
    arguments: Any


class OllamaToolCall(Struct):
    """One tool call."""

    function: OllamaFunctionCall


class OllamaAnswerMessage(Struct, kw_only=True):
    """A message, or a part of one."""

    role: str
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaToolCall] | UnsetType = UNSET


class OllamaLine(Struct, kw_only=True):
    """A line of an answer; the last one has the numbers, durations in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    adapter: AdapterBody | UnsetType = UNSET


class ChatLine(OllamaLine, kw_only=True):
    """Answer of `POST /api/chat`."""

    message: OllamaAnswerMessage


class GenerateLine(OllamaLine, kw_only=True):
    """Answer of `POST /api/generate`."""

    response: str
    thinking: str | UnsetType = UNSET


class EmbedAnswer(Struct, kw_only=True):
    """Answer of `POST /api/embed`."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    adapter: AdapterBody | UnsetType = UNSET


class OllamaModel(Struct, kw_only=True):
    """One model; size in bytes, digest is the sha256 of its file."""

    name: str
    model: str
    size: int
    digest: str
    details: dict[str, Any]
    modified_at: str | UnsetType = UNSET
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    capabilities: list[str] | UnsetType = UNSET


class OllamaModelList(Struct):
    """Answer of `GET /api/tags` and `GET /api/ps`."""

    models: list[OllamaModel]


class ShowAnswer(Struct, kw_only=True):
    """Answer of `POST /api/show`."""

    modelfile: str
    parameters: str
    template: str
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class PullLine(Struct, kw_only=True):
    """A line of the answer to `POST /api/pull`, in bytes."""

    status: str
    digest: str | UnsetType = UNSET
    total: int | UnsetType = UNSET
    completed: int | UnsetType = UNSET


class VersionText(Struct):
    """Answer of `GET /api/version`."""

    version: str
