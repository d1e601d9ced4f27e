"""The mixed load of a soak: what clients do to a daemon in a day, kinds in seeded random order.

Each kind is one function in `KINDS`, which makes a request and says how its answer must look. A cancelled
request is a stream whose client goes away; over-long and malformed ones must be refused, and nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema

from bench.answer import AnswerError, read_answer
from bench.schemas import SCHEMAS
from bench.stream import Exchange, StreamError, parse_response, raw_request_bytes, request_bytes

CHAT = "/v1/chat/completions"
ANSWER_LIMIT_S = 300.0
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 16}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}
MALFORMED = (
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[]",
    b'{"messages": 3}',
    b'{"messages": [], "bogus": 1}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b"[" * 100_000,
)
TOPICS = ("tides", "paper", "owls", "salt", "kites", "bridges", "tea", "moss", "clocks", "maps")


@dataclass(frozen=True, slots=True)
class Work:
    """One request. status: that must come back (None: the client goes away after `seconds`)."""

    kind: str
    request: bytes
    status: int | None
    seconds: float = ANSWER_LIMIT_S
    schema: Mapping[str, Any] | None = None


Maker = Callable[[int, int, random.Random], Work]  # port, tokens of a client's context, chance


def _question(chance: random.Random) -> dict[str, Any]:
    """A chat body with a prompt of 20 to 200 tokens; half of them share their beginning."""
    beginning = "You are a patient teacher. " * chance.choice((0, 0, 4, 30))
    text = f"{beginning}Tell me about {chance.choice(TOPICS)} and the number {chance.randrange(10_000)}."
    return {"messages": [{"role": "user", "content": text}], "max_tokens": chance.randrange(8, 49)}


def _chat(port: int, context: int, chance: random.Random) -> Work:
    return Work("chat", request_bytes(port, CHAT, _question(chance)), 200)


def _stream(port: int, context: int, chance: random.Random) -> Work:
    body = {**_question(chance), "stream": True, "stream_options": {"include_usage": True}}
    return Work("stream", request_bytes(port, CHAT, body), 200)


def _schema(port: int, context: int, chance: random.Random) -> Work:
    name = chance.choice(list(SCHEMAS))
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMAS[name]}}
    body = {**_question(chance), "max_tokens": 200, "response_format": wanted}
    return Work("schema", request_bytes(port, CHAT, body), 200, schema=SCHEMAS[name])


def _tools(port: int, context: int, chance: random.Random) -> Work:
    choice = chance.choice(("auto", "required", "none"))
    body = {**_question(chance), "tools": [TOOL], "tool_choice": choice, "stream": chance.random() < 0.5}
    return Work("tools", request_bytes(port, CHAT, body), 200)


def _several(port: int, context: int, chance: random.Random) -> Work:
    return Work("n", request_bytes(port, CHAT, {**_question(chance), "n": chance.randrange(2, 4)}), 200)


def _embedding(port: int, context: int, chance: random.Random) -> Work:
    texts = [f"{chance.choice(TOPICS)} " * chance.randrange(1, 30) for _ in range(chance.randrange(1, 4))]
    return Work("embeddings", request_bytes(port, "/v1/embeddings", {"input": texts}), 200)


def _cancelled(port: int, context: int, chance: random.Random) -> Work:
    body = {**_question(chance), "max_tokens": context // 2, "stream": chance.random() < 0.7}
    return Work("cancelled", request_bytes(port, CHAT, body), None, seconds=chance.uniform(0.01, 1))


def _overlong(port: int, context: int, chance: random.Random) -> Work:
    body = {"messages": [{"role": "user", "content": "moss " * (context + 100)}]}
    return Work("over-long", request_bytes(port, CHAT, body), 400)


def _malformed(port: int, context: int, chance: random.Random) -> Work:
    return Work("malformed", raw_request_bytes(port, CHAT, chance.choice(MALFORMED)), 400)


# kind -> how often, in twentieths
KINDS: dict[Maker, int] = {
    _stream: 6,
    _chat: 3,
    _schema: 2,
    _tools: 2,
    _several: 1,
    _embedding: 2,
    _cancelled: 2,
    _overlong: 1,
    _malformed: 1,
}


def work(port: int, context: int, chance: random.Random) -> Work:
    """The next request of a client."""
    (maker,) = chance.choices(list(KINDS), list(KINDS.values()))
    return maker(port, context, chance)


def fault(asked: Work, record: Exchange) -> str | None:
    """What is wrong with the answer, in one line; None when it is as it must be."""
    if asked.status is None:
        return None
    if record.error is not None:
        return f"{asked.kind}: {record.error}"
    try:
        response = parse_response(record.arrivals)
    except StreamError as error:
        return f"{asked.kind}: {error}"
    # A stream is not read beyond its last event, so its framing may be incomplete.
    complete = response.complete or [event.data for event in response.events()][-1:] == [b"[DONE]"]
    if response.status != asked.status or not complete:
        return f"{asked.kind}: HTTP {response.status}: {response.body[:200]!r}"
    if asked.schema is not None:
        choice = json.loads(response.body)["choices"][0]
        if choice["finish_reason"] == "stop":
            try:
                jsonschema.validate(json.loads(choice["message"]["content"]), asked.schema)
            except (ValueError, jsonschema.ValidationError) as error:
                return f"{asked.kind}: {str(error).splitlines()[0]}"
    return None


def times(asked: Work, record: Exchange) -> tuple[float, tuple[float, ...]] | None:
    """Time to first text and gaps between pieces (s) of a stream; None for anything else."""
    if asked.kind != "stream":
        return None
    try:
        answer = read_answer(record)
    except AnswerError:
        return None  # an empty answer is no fault, and a fault is found elsewhere
    return answer.ttft, answer.gaps
