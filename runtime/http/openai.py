"""OpenAI's routes: chat completions, completions and models, streamed or whole.

The path of a request: `chat_completions` here, `ServedModel.chat`, `Engine.submit`, `Engine._step`,
`native.Context.decode`; its events come back through the `Generation` that `ServedModel.chat` returns.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

import lichen
from lichen.errors import LichenError, NotFound
from lichen.runtime.generation import Generation
from lichen.runtime.http.guard import error_body
from lichen.runtime.http.schema import Body, ChatBody, CompletionBody, parse
from lichen.runtime.resident import Candidate, ModelStatus
from lichen.runtime.sequence import Finished, Piece, Prefill, Timings, Usage
from lichen.runtime.served_model import ServedModel

HEARTBEAT_S = 10.0  # a comment after so much silence, so that proxies keep the connection
LARGE_BODY = 1 << 18  # bytes; parsed off the event loop

encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class _Shape:
    """How one route words its answers: id prefix, object names, and where the text goes."""

    prefix: str
    whole: str
    chunk: str
    choice: Callable[[str, str | None], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None


_CHAT = _Shape(
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=lambda text, reason: {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": reason,
    },
    delta=lambda text: {"delta": {"content": text} if text else {}},
    opening={"delta": {"role": "assistant", "content": ""}},
)
_TEXT = _Shape(
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    choice=lambda text, reason: {"index": 0, "text": text, "logprobs": None, "finish_reason": reason},
    delta=lambda text: {"text": text},
    opening=None,
)


class OpenAIRoutes:
    """The handlers. use: holds a model by name, loading it if need be. known and loaded: for the list."""

    def __init__(
        self,
        use: Callable[[str | None, float | None], AbstractAsyncContextManager[ServedModel]],
        known: Callable[[], Awaitable[list[Candidate]]],
        loaded: Callable[[], list[ModelStatus]],
    ) -> None:
        self._use = use
        self._known = known
        self._loaded = loaded
        self._started = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/v1/chat/completions", self.chat_completions),
            web.post("/v1/completions", self.completions),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
        ]

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        body = await _read(request, ChatBody)
        async with self._use(body.model, body.keep_alive) as model:
            generation = await model.chat([message.plain() for message in body.messages], body.sampling())
            return await self._answer(request, body, model, generation, _CHAT)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Continue a text."""
        body = await _read(request, CompletionBody)
        async with self._use(body.model, body.keep_alive) as model:
            generation = await model.complete(body.one_prompt(), body.sampling())
            return await self._answer(request, body, model, generation, _TEXT)

    async def models(self, request: web.Request) -> web.Response:
        """All models that can answer, loaded or not, the default one first."""
        return _json({"object": "list", "data": await self._cards()})

    async def model(self, request: web.Request) -> web.Response:
        """One model."""
        name = request.match_info["name"]
        cards = await self._cards()
        for card in cards:
            if name == card["id"] or (name == "default" and card is cards[0]):
                return _json(card)
        there = ", ".join(card["id"] for card in cards)
        raise NotFound(f"The model {name!r} is not here.", hint=f"Served: {there}.", param="model")

    async def _cards(self) -> list[dict[str, Any]]:
        loaded = {status.name: status for status in self._loaded() if status.state == "ready"}
        known = {candidate.name: candidate for candidate in await self._known()}
        names = list(known) or list(loaded)
        return [self._card(name, known.get(name), loaded.get(name)) for name in names]

    def _card(self, name: str, known: Candidate | None, loaded: ModelStatus | None) -> dict[str, Any]:
        there = known or loaded
        assert there is not None, "a name comes from one of them"
        card = {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "local",
            "architecture": there.architecture or (loaded.architecture if loaded else ""),
            "sha256": there.sha256,
            "size": there.size,
            "loaded": loaded is not None,
            "capabilities": ["completion"],
        }
        return {**card, "context_length": loaded.context} if loaded else card

    async def _answer(
        self, request: web.Request, body: Body, model: ServedModel, generation: Generation, shape: _Shape
    ) -> web.StreamResponse:
        head = {
            "id": shape.prefix + secrets.token_hex(12),
            "object": shape.chunk if body.stream else shape.whole,
            "created": int(time.time()),
            "model": model.info.name,
            "system_fingerprint": f"lichen-{lichen.__version__}",
        }
        try:
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return await _Stream(request, head, shape, include_usage=usage).send(generation)
            text = await generation.text()
        finally:
            generation.close()  # a client that is gone frees its cells at the next step
        finished = generation.finished
        assert finished is not None, "text() returns only when the answer is complete"
        choice = shape.choice(text, finished.reason)
        return _json(
            {
                **head,
                "choices": [choice],
                "usage": usage_json(finished.usage),
                "timings": timings_json(finished),
            }
        )


class _Stream:
    """One answer as server-sent events, chunk for chunk as OpenAI's clients expect them."""

    def __init__(
        self, request: web.Request, head: dict[str, Any], shape: _Shape, *, include_usage: bool
    ) -> None:
        self._request = request
        self._head = head
        self._shape = shape
        self._include_usage = include_usage
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        # A token's chunk is this frame around its text, so that nothing else is encoded for each token.
        marker = "\x00"
        frame = self._chunk(shape.delta(marker), None)
        self._before, _, self._after = frame.partition(encode(marker))

    async def send(self, generation: Generation) -> web.StreamResponse:
        """Write events until the answer ends; an error after the first byte is sent as an event."""
        response = self._response
        await response.prepare(self._request)
        try:
            if self._shape.opening is not None:
                await response.write(self._chunk(self._shape.opening, None))
            while not generation.done:
                event = await generation.next(HEARTBEAT_S)
                if isinstance(event, Piece):
                    await response.write(self._before + encode(event.text) + self._after)
                elif isinstance(event, Prefill):
                    await response.write(b": prefill %d/%d\n\n" % (event.done, event.total))
                elif event is None:
                    await response.write(b": waiting\n\n")
                else:
                    await response.write(self._closing(event))
        except LichenError as error:
            await response.write(b"data: " + encode(error_body(error)) + b"\n\n")
        except ConnectionError:  # the client is gone; the generation is closed by the caller
            return response
        await response.write_eof()
        return response

    def _closing(self, event: Any) -> bytes:
        assert isinstance(event, Finished), "the only event that is left"
        last = self._chunk(self._shape.delta(""), event.reason, timings=timings_json(event))
        if self._include_usage:
            usage = {**self._head, "choices": [], "usage": usage_json(event.usage)}
            last += b"data: " + encode(usage) + b"\n\n"
        return last + b"data: [DONE]\n\n"

    def _chunk(self, part: dict[str, Any], reason: str | None, **more: Any) -> bytes:
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        chunk: dict[str, Any] = {**self._head, "choices": [choice], **more}
        if self._include_usage:
            chunk["usage"] = None
        return b"data: " + encode(chunk) + b"\n\n"


def usage_json(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timings_json(finished: Finished) -> dict[str, Any]:
    """lichen's own addition to an answer: where its time went, in milliseconds."""
    timings: Timings = finished.timings
    return {
        "queued_ms": round(timings.queued_s * 1e3, 3),
        "prefill_ms": round(timings.prefill_s * 1e3, 3),
        "decode_ms": round(timings.decode_s * 1e3, 3),
        "ttft_ms": round(timings.ttft_s * 1e3, 3),
        "tokens_per_second": round(timings.tokens_per_second, 2),
        "cached_tokens": finished.usage.cached_tokens,
    }


async def _read(request: web.Request, kind: type[msgspec.Struct]) -> Any:
    data = await request.read()
    if len(data) > LARGE_BODY:
        return await asyncio.to_thread(parse, data, kind)
    return parse(data, kind)


def _json(body: dict[str, Any]) -> web.Response:
    return web.Response(body=encode(body), content_type="application/json")
