"""Ollama's routes, the part that apps use: chat, generate, embed, tags, ps, show, pull and version.

Answers are lines of JSON. Times are in nanoseconds, as that API has them.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

import lichen
from lichen.errors import LichenError, NotFound, RequestError
from lichen.runtime.adaptation import Adaptation
from lichen.runtime.answer import CallArguments, CallBegins, Part, Said
from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.generation import Generation
from lichen.runtime.http.access_log import log_adapter
from lichen.runtime.http.guard import error_text, owner
from lichen.runtime.http.ollama_schema import ChatRequest, EmbedRequest, GenerateRequest
from lichen.runtime.http.openai import Use, json_response, read
from lichen.runtime.http.wording import Message, adapter_json
from lichen.runtime.sequence import Finished, Piece
from lichen.runtime.served_model import ServedModel
from lichen.runtime.variants import Variants


class OllamaRoutes:
    """The handlers. use: holds a model by name, loading it if need be."""

    def __init__(self, use: Use, models: Variants) -> None:
        self._use = use
        self._models = models

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/api/chat", self.chat),
            web.post("/api/generate", self.generate),
            web.post("/api/embed", self.embed),
            web.get("/api/version", self.version),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation; without messages, only load or unload the model."""
        body: ChatRequest = await read(request, ChatRequest)
        started = time.perf_counter()
        if not body.messages:
            return await self._load_only(body.model, body.keep_alive, {"message": _message({"content": ""})})
        async with self._use(bare(body.model), seconds(body.keep_alive)) as model:
            loaded = time.perf_counter()
            messages = [message.plain() for message in body.messages]
            (generation,) = await model.chat(
                messages, body.sampling(model.info.context), body.form(), owner=owner()
            )
            lines = _Lines(body.model, started, loaded, chat=True, adaptation=generation.sequence.adaptation)
            return await _send(request, generation, lines, stream=body.stream)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answer one prompt, through the chat template unless it is `raw`."""
        body: GenerateRequest = await read(request, GenerateRequest)
        started = time.perf_counter()
        if not body.prompt:
            return await self._load_only(body.model, body.keep_alive, {"response": ""})
        async with self._use(bare(body.model), seconds(body.keep_alive)) as model:
            loaded = time.perf_counter()
            generation = await self._generation(model, body)
            lines = _Lines(body.model, started, loaded, chat=False, adaptation=generation.sequence.adaptation)
            return await _send(request, generation, lines, stream=body.stream)

    async def _generation(self, model: ServedModel, body: GenerateRequest) -> Generation:
        options = body.sampling(model.info.context)
        if body.raw:
            (generation,) = await model.complete(body.prompt, options, schema=body.schema(), owner=owner())
            return generation
        messages = [{"role": "system", "content": body.system}] if body.system else []
        messages.append({"role": "user", "content": body.prompt})
        (generation,) = await model.chat(messages, options, AnswerForm(schema=body.schema()), owner=owner())
        return generation

    async def _load_only(self, name: str, keep_alive: Any, empty: dict[str, Any]) -> web.Response:
        """Load a model, or with keep_alive 0 unload it."""
        wanted = seconds(keep_alive)
        if wanted == 0:
            with suppress(NotFound):  # it is gone already
                await self._models.unload(bare(name))
        else:
            async with self._use(bare(name), wanted):
                pass
        reason = "unload" if wanted == 0 else "load"
        return json_response(
            {"model": name, "created_at": now(), **empty, "done": True, "done_reason": reason}
        )

    async def embed(self, request: web.Request) -> web.Response:
        """A vector for each input."""
        body: EmbedRequest = await read(request, EmbedRequest)
        started = time.perf_counter()
        texts = [body.input] if isinstance(body.input, str) else body.input
        async with self._use(bare(body.model), seconds(body.keep_alive)) as model:
            loaded = time.perf_counter()
            vectors, count = [], 0
            for text in texts:
                vector, tokens = await model.embed(text, truncate=body.truncate, dimensions=body.dimensions)
                vectors.append(vector)
                count += tokens
            log_adapter(model.adaptation)
            made_with = adapter_json(model.adaptation)
        return json_response(
            {
                "model": body.model,
                **made_with,
                "embeddings": vectors,
                "total_duration": nanoseconds(time.perf_counter() - started),
                "load_duration": nanoseconds(loaded - started),
                "prompt_eval_count": count,
            }
        )

    async def version(self, request: web.Request) -> web.Response:
        """lichen's version."""
        return json_response({"version": lichen.__version__})


class _Lines:
    """The lines of one answer."""

    def __init__(
        self, model: str, started: float, loaded: float, *, chat: bool, adaptation: Adaptation
    ) -> None:
        log_adapter(adaptation)
        self._head = {"model": model, **adapter_json(adaptation)}
        self._started, self._loaded, self._chat = started, loaded, chat

    def part(self, message: dict[str, Any]) -> dict[str, Any]:
        """A line with a part of the answer."""
        return {**self._head, "created_at": now(), **self._worded(message), "done": False}

    def last(self, message: dict[str, Any], finished: Finished) -> dict[str, Any]:
        """The line that ends it, with its numbers."""
        usage, timings = finished.usage, finished.timings
        return {
            **self._head,
            "created_at": now(),
            **self._worded(message),
            "done": True,
            "done_reason": finished.reason,
            "total_duration": nanoseconds(time.perf_counter() - self._started),
            "load_duration": nanoseconds(self._loaded - self._started),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(timings.prefill_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(timings.decode_s),
        }

    def _worded(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._chat:
            return {"message": _message(message)}
        thinking = {"thinking": message["reasoning_content"]} if message.get("reasoning_content") else {}
        return {"response": message.get("content") or "", **thinking}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message in this API's words: arguments are an object, reasoning is `thinking`."""
    worded: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
    if message.get("reasoning_content"):
        worded["thinking"] = message["reasoning_content"]
    if calls := message.get("tool_calls"):
        worded["tool_calls"] = [
            {
                "function": {
                    "name": call["function"]["name"],
                    "arguments": _object(call["function"]["arguments"]),
                }
            }
            for call in calls
        ]
    return worded


def _object(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}  # the answer was cut off in the middle of a call


async def _send(
    request: web.Request, generation: Generation, lines: _Lines, *, stream: bool
) -> web.StreamResponse:
    try:
        if not stream:
            message = Message()
            async for parts in _parts(generation):
                message.add(parts)
            assert generation.finished is not None, "the parts end with the answer"
            return json_response(lines.last(message.plain(), generation.finished))
        return await _stream(request, generation, lines)
    finally:
        generation.close()


async def _stream(request: web.Request, generation: Generation, lines: _Lines) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    whole = Message()  # a call is shown when it is complete, as this API has no pieces of calls
    try:
        async for parts in _parts(generation):
            whole.add(parts)
            shown = Message()
            shown.add(part for part in parts if not isinstance(part, CallBegins | CallArguments))
            plain = shown.plain()
            if plain["content"] or plain.get("reasoning_content"):
                await response.write(_line(lines.part(plain)))
        assert generation.finished is not None, "the parts end with the answer"
        if calls := whole.plain().get("tool_calls"):
            await response.write(_line(lines.part({"tool_calls": calls})))
        await response.write(_line(lines.last({}, generation.finished)))
    except LichenError as error:
        await response.write(_line({"error": error_text(error)}))
    except ConnectionError:  # the client is gone; the generation is closed by the caller
        return response
    await response.write_eof()
    return response


async def _parts(generation: Generation) -> AsyncIterator[list[Part]]:
    reader = generation.reader
    async for event in generation:
        if isinstance(event, Piece):
            yield reader.feed(event.text) if reader is not None else [Said(event.text)]
    if reader is not None and generation.finished is not None:
        yield reader.flush(cut=generation.finished.reason == "length")


def _line(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def bare(name: str) -> str:
    """A model's name without the tag that this API's clients add."""
    return name.removesuffix(":latest")


def now() -> str:
    """The time as this API writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def nanoseconds(value: float) -> int:
    """Seconds in this API's unit."""
    return round(value * 1e9)


def seconds(keep_alive: float | str | None) -> float | None:
    """Seconds that a `keep_alive` means: a number, or a text such as "5m", "1h30m", "-1".

    Below 0 means for ever. Raises RequestError for a text that means nothing.
    """
    if not isinstance(keep_alive, str):
        return keep_alive
    found = re.fullmatch(r"(-?)((?:\d+(?:\.\d+)?(?:ms|s|m|h)?)+)", keep_alive.strip())
    if found is None:
        raise RequestError(
            f"keep_alive {keep_alive!r} is no length of time, such as 300 or 5m.", param="keep_alive"
        )
    scale = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
    total = sum(float(n) * scale[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", found[2]))
    return -total if found[1] else total
