"""Every route of the daemon as a row: what it takes, what it answers, and which errors it may give.

`openapi.py` makes the document of it; a test fails if it and the daemon's routes differ.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lichen.runtime.http import journal_schema, ollama_responses, ollama_schema, responses, schema
from lichen.runtime.http.models import LoadBody, UnloadBody

EVERY = (400, 401, 403, 429, 500, 503)  # what the guard answers for any route, or a defect of ours
BODY = (408, 413, 415)
_ANSWER = (404, 422, 504, 507)  # no such model, it is broken, takes too long, or does not fit
_KEPT = (404, 409, 507)  # no such record or file, nothing is kept here, or there is no room


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One operation.

    body, answer: structs, or for an answer that is no JSON its media type. event: what a stream's events
    hold; parameters: of the path, name -> meaning; query: a struct; errors: statuses besides those of every
    route. upload: the body is a form with a file, of this purpose.
    """

    method: Literal["get", "post", "delete"]
    path: str
    id: str
    summary: str
    tag: str
    answer: type[msgspec.Struct] | str
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    upload: str | None = None
    event: type[msgspec.Struct] | None = None
    lines: bool = False  # an answer may also be lines of JSON
    parameters: dict[str, str] = {}
    errors: tuple[int, ...] = ()
    open: bool = False  # needs no API key
    also: dict[int, str] = {}  # further statuses with the same answer


ROUTES = (
    Route(
        method="post",
        path="/v1/chat/completions",
        id="createChatCompletion",
        summary="Answer a conversation",
        tag="OpenAI",
        body=schema.ChatBody,
        answer=responses.ChatCompletion,
        event=responses.ChatCompletionChunk,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/v1/completions",
        id="createCompletion",
        summary="Continue a text",
        tag="OpenAI",
        body=schema.CompletionBody,
        answer=responses.Completion,
        event=responses.CompletionChunk,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/v1/embeddings",
        id="createEmbedding",
        summary="A vector for each input",
        tag="OpenAI",
        body=schema.EmbeddingsBody,
        answer=responses.EmbeddingList,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/v1/feedback",
        id="createFeedback",
        summary="Rate or correct an answer; answered once it is durable",
        tag="lichen",
        body=journal_schema.FeedbackBody,
        answer=journal_schema.FeedbackObject,
        errors=_KEPT,
    ),
    Route(
        method="get",
        path="/v1/feedback",
        id="listFeedback",
        summary="What was kept and said, without the texts",
        tag="lichen",
        query=journal_schema.FeedbackQuery,
        answer=journal_schema.FeedbackList,
        errors=_KEPT,
    ),
    Route(
        method="get",
        path="/v1/feedback/{id}",
        id="retrieveFeedback",
        summary="One record with its texts",
        tag="lichen",
        answer=journal_schema.FeedbackRecord,
        parameters={"id": "Id of the record."},
        errors=_KEPT,
    ),
    Route(
        method="delete",
        path="/v1/feedback/{id}",
        id="deleteFeedback",
        summary="Forget a record; answered once no byte of it is left",
        tag="lichen",
        answer=journal_schema.FeedbackDeleted,
        parameters={"id": "Id of the record."},
        errors=_KEPT,
    ),
    Route(
        method="post",
        path="/v1/files",
        id="createFile",
        summary="Upload a file to learn from; every line is checked",
        tag="OpenAI",
        upload="fine-tune",
        answer=journal_schema.FileObject,
        errors=_KEPT,
    ),
    Route(
        method="get",
        path="/v1/files",
        id="listFiles",
        summary="The files to learn from",
        tag="OpenAI",
        query=journal_schema.FilesQuery,
        answer=journal_schema.FileList,
        errors=_KEPT,
    ),
    Route(
        method="get",
        path="/v1/files/{id}",
        id="retrieveFile",
        summary="One file",
        tag="OpenAI",
        answer=journal_schema.FileObject,
        parameters={"id": "Id of the file."},
        errors=_KEPT,
    ),
    Route(
        method="delete",
        path="/v1/files/{id}",
        id="deleteFile",
        summary="Delete a file",
        tag="OpenAI",
        answer=journal_schema.FileDeleted,
        parameters={"id": "Id of the file."},
        errors=_KEPT,
    ),
    Route(
        method="get",
        path="/v1/files/{id}/content",
        id="downloadFile",
        summary="A file's bytes",
        tag="OpenAI",
        answer="application/jsonl",
        parameters={"id": "Id of the file."},
        errors=_KEPT,
    ),
    Route(
        method="post",
        path="/tokenize",
        id="tokenize",
        summary="A text's token ids",
        tag="llama-server",
        body=schema.TokenizeBody,
        answer=responses.TokenList,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/detokenize",
        id="detokenize",
        summary="The text of token ids",
        tag="llama-server",
        body=schema.DetokenizeBody,
        answer=responses.TokenText,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/apply-template",
        id="applyTemplate",
        summary="The prompt text of a conversation",
        tag="llama-server",
        body=schema.TemplateBody,
        answer=responses.PromptText,
        errors=_ANSWER,
    ),
    Route(
        method="get",
        path="/v1/models",
        id="listModels",
        summary="The models that can answer now",
        tag="OpenAI",
        answer=responses.ModelList,
    ),
    Route(
        method="get",
        path="/v1/models/{name}",
        id="retrieveModel",
        summary="One model",
        tag="OpenAI",
        answer=responses.ModelCard,
        parameters={"name": "Name of the model; it may contain slashes."},
        errors=(404,),
    ),
    Route(
        method="get",
        path="/health",
        id="health",
        summary="Whether requests are answered",
        tag="lichen",
        answer=responses.Health,
        open=True,
        also={503: "Requests are not answered now."},
    ),
    Route(
        method="get",
        path="/version",
        id="version",
        summary="Versions of lichen and of the llama.cpp bindings",
        tag="lichen",
        answer=responses.Version,
    ),
    Route(
        method="get",
        path="/status",
        id="status",
        summary="What runs now: model, slots, queue, counters, memory",
        tag="lichen",
        answer=responses.Status,
    ),
    Route(
        method="get",
        path="/metrics",
        id="metrics",
        summary="What lichen counts, for Prometheus",
        tag="lichen",
        answer="text/plain",
    ),
    Route(
        method="get",
        path="/openapi.json",
        id="openapi",
        summary="This document",
        tag="lichen",
        answer="application/json",
    ),
    Route(
        method="post",
        path="/models/load",
        id="loadModel",
        summary="Load a model, and pin it or not",
        tag="lichen",
        body=LoadBody,
        answer=responses.ModelState,
        lines=True,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/models/unload",
        id="unloadModel",
        summary="Unload a model once it is idle",
        tag="lichen",
        body=UnloadBody,
        answer=responses.Unloaded,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/api/chat",
        id="ollamaChat",
        summary="Answer a conversation",
        tag="Ollama",
        body=ollama_schema.ChatRequest,
        answer=ollama_responses.ChatLine,
        lines=True,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/api/generate",
        id="ollamaGenerate",
        summary="Answer a prompt",
        tag="Ollama",
        body=ollama_schema.GenerateRequest,
        answer=ollama_responses.GenerateLine,
        lines=True,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/api/embed",
        id="ollamaEmbed",
        summary="A vector for each input",
        tag="Ollama",
        body=ollama_schema.EmbedRequest,
        answer=ollama_responses.EmbedAnswer,
        errors=_ANSWER,
    ),
    Route(
        method="post",
        path="/api/show",
        id="ollamaShow",
        summary="What a model's file says of itself",
        tag="Ollama",
        body=ollama_schema.ModelRequest,
        answer=ollama_responses.ShowAnswer,
        errors=(404, 422, 500),
    ),
    Route(
        method="post",
        path="/api/pull",
        id="ollamaPull",
        summary="Fetch a model",
        tag="Ollama",
        body=ollama_schema.ModelRequest,
        answer=ollama_responses.PullLine,
        lines=True,
        errors=(404, 422, 500, 502, 503, 507),
    ),
    Route(
        method="get",
        path="/api/tags",
        id="ollamaTags",
        summary="The models that can answer",
        tag="Ollama",
        answer=ollama_responses.OllamaModelList,
    ),
    Route(
        method="get",
        path="/api/ps",
        id="ollamaPs",
        summary="The models that are loaded",
        tag="Ollama",
        answer=ollama_responses.OllamaModelList,
    ),
    Route(
        method="get",
        path="/api/version",
        id="ollamaVersion",
        summary="The version of lichen",
        tag="Ollama",
        answer=ollama_responses.VersionText,
    ),
)
