"""The OpenAPI 3.1 document of the daemon, made from the types that its routes read and write.

ROUTES is the table of routes; schemas come from the structs of `schema.py` (requests) and `responses.py`
(answers) through msgspec, so that a new field needs nothing here and a new route needs one row. Added to
what msgspec knows: `null` for "not given", the fields that are accepted without effect, and the ranges that
the engine checks, which a test compares with what it refuses.

Not covered: rules between fields, and what depends on the model (its name, its vocabulary, its context).
"""

from __future__ import annotations

import functools
import inspect
from http import HTTPStatus
from typing import Any

import msgspec

import lichen
from lichen import errors
from lichen.runtime.http import ollama_responses, responses, schema
from lichen.runtime.http.ignored import CALL, MESSAGE, Fields
from lichen.runtime.http.route_table import BODY, EVERY, ROUTES, Route

Schema = dict[str, Any]

# Ranges that the engine checks; `SamplingOptions.check` raises for everything outside them.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "max_tokens": (1, 1 << 31),
    "seed": (-(1 << 63), (1 << 64) - 1),
}

# What is inside a body and comes back from an answer -> its fields that are accepted without effect.
SENT_BACK = {"ChatMessage": MESSAGE, "ToolCall": CALL, "FunctionCall": CALL}


@functools.cache
def document_bytes() -> bytes:
    """The document as JSON; the same for every daemon of this version."""
    return msgspec.json.encode(_document())


def document() -> Schema:
    """The document as whoever fetches it sees it."""
    read: Schema = msgspec.json.decode(document_bytes())
    return read


def _document() -> Schema:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lichen",
            "version": lichen.__version__,
            "description": "Private language models on your own machine, behind OpenAI's API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8642"}],
        "paths": _paths(),
        "components": {
            "schemas": _components(),
            "responses": {
                _name(route, status): _error_response(route, status)
                for route in ROUTES
                for status in _statuses(route)
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed only where the daemon was started with an API key.",
                }
            },
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> Schema:
    paths: Schema = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return paths


def _operation(route: Route) -> Schema:
    answer = {"description": "The answer.", "content": _content(route)}
    operation: Schema = {
        "operationId": route.id,
        "summary": route.summary,
        "tags": [route.tag],
        "responses": {
            "200": answer,
            **{
                str(status): {"$ref": f"#/components/responses/{_name(route, status)}"}
                for status in _statuses(route)
            },
            **{str(status): {**answer, "description": text} for status, text in route.also.items()},
        },
    }
    if route.body is not None:
        content = {"application/json": {"schema": _reference(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.parameters:
        operation["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": text,
                "schema": {"type": "string", "minLength": 1},
            }
            for name, text in route.parameters.items()
        ]
    if route.open:
        operation["security"] = []
    return operation


def _content(route: Route) -> Schema:
    if isinstance(route.answer, str):
        kind = "object" if route.answer == "application/json" else "string"
        return {route.answer: {"schema": {"type": kind}}}
    content: Schema = {"application/json": {"schema": _reference(route.answer)}}
    if route.lines:
        content["application/x-ndjson"] = {"schema": _reference(route.answer)}
    if route.event is not None:
        content["text/event-stream"] = {"schema": _event(route.event)}
    return content


def _event(kind: type[msgspec.Struct]) -> Schema:
    """One server-sent event; before version 3.2, OpenAPI has the schema of a stream mean its events."""
    either = [_reference(kind), _reference(responses.Error)]
    return {
        "type": "object",
        "description": (
            f"With `stream: true`, server-sent events: each `data` is a {kind.__name__} or, if the answer "
            "breaks off, an Error; the last is `[DONE]`. Lines that begin with a colon are comments."
        ),
        "properties": {
            "data": {
                "type": "string",
                "anyOf": [
                    {"const": "[DONE]"},
                    {"contentMediaType": "application/json", "contentSchema": {"anyOf": either}},
                ],
            }
        },
        "required": ["data"],
    }


def _statuses(route: Route) -> list[int]:
    """Statuses of the errors that this route may answer with."""
    every = {status for status in EVERY if not (route.open and status in (401, 429))}
    body = BODY if route.body is not None else ()
    return sorted({*every, *body, *route.errors} - set(route.also))


def _name(route: Route, status: int) -> str:
    """Of an error's response; Ollama's routes have their own."""
    return f"ollama-{status}" if route.tag == "Ollama" else str(status)


def _error_response(route: Route, status: int) -> Schema:
    kind = ollama_responses.ErrorText if route.tag == "Ollama" else responses.Error
    causes = [
        cause
        for cause in vars(errors).values()
        if inspect.isclass(cause) and issubclass(cause, errors.LichenError) and cause.status == status
    ]
    codes = ", ".join(f"`{cause.code}`" for cause in causes)
    response: Schema = {
        "description": HTTPStatus(status).phrase + (f"; codes: {codes}." if codes else "."),
        "content": {"application/json": {"schema": _reference(kind)}},
    }
    if status == 429:
        response["headers"] = {
            "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
        }
    return response


def _components() -> Schema:
    """Schemas of all structs, by name."""
    bodies = [route.body for route in ROUTES if route.body is not None]
    answers = [kind for route in ROUTES for kind in (route.answer, route.event) if isinstance(kind, type)]
    kinds = dict.fromkeys([*bodies, *answers, responses.Error, ollama_responses.ErrorText])
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    ignored = {kind.__name__: schema.without_effect(kind) for kind in bodies} | SENT_BACK
    for name, fields in ignored.items():
        _as_accepted(components[name], fields)
    return dict(sorted(components.items()))


def _as_accepted(body: Schema, ignored: Fields) -> None:
    """Make a schema of requests say all that `schema.parse` and the engine accept, and no more."""
    properties: dict[str, Schema] = body["properties"]
    for name, limits in LIMITS.items():
        if name in properties:
            _limit(properties[name], *limits)
    for name in properties.keys() - set(body["required"]):
        properties[name] = _or_null(properties[name])
    for name, values in ignored.items():
        properties[name] = _without_effect(values)
    body["additionalProperties"] = {"type": "null"}  # "not given", whatever the name


def _limit(field: Schema, low: float, high: float) -> None:
    for option in field.get("anyOf", [field]):
        if option.get("type") in ("integer", "number"):
            option |= {"minimum": low, "maximum": high}


def _or_null(field: Schema) -> Schema:
    """The field, or null for "not given"."""
    default = {"default": field["default"]} if "default" in field else {}
    options = field.get("anyOf", [{key: value for key, value in field.items() if key != "default"}])
    return {
        "anyOf": [*(option for option in options if option != {"type": "null"}), {"type": "null"}],
        **default,
    }


def _without_effect(values: tuple[Any, ...]) -> Schema:
    if ... in values:
        return {"description": "Accepted, and changes nothing."}
    if dict in values:
        return {"type": ["object", "null"], "description": "Accepted, and changes nothing."}
    return {"enum": [*values, None], "description": "Accepted only with a value that changes nothing."}


def _reference(kind: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
