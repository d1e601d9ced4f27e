"""OpenAI's routes: chat completions, completions, embeddings and models.

The path of a request: `chat_completions` here, `ServedModel.chat`, `Engine.submit`, `Engine._step`,
`native.Context.decode`; its events come back through the `Generation`s that `ServedModel.chat` returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from lichen.errors import NotFound, UnsupportedField
from lichen.runtime.generation import Generation
from lichen.runtime.http import wording
from lichen.runtime.http.answers import CHAT, TEXT, Answer, Wording
from lichen.runtime.http.schema import Body, ChatBody, CompletionBody, EmbeddingsBody, parse
from lichen.runtime.served_model import ServedModel

LARGE_BODY = 1 << 18  # bytes; parsed off the event loop

encode = msgspec.json.encode


class OpenAIRoutes:
    """The handlers, over whichever model `current` gives (it raises while none is loaded)."""

    def __init__(self, current: Callable[[], ServedModel]) -> None:
        self._current = current
        self._started = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/v1/chat/completions", self.chat_completions),
            web.post("/v1/completions", self.completions),
            web.post("/v1/embeddings", self.embeddings),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
        ]

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        body: ChatBody = await read(request, ChatBody)
        model = self.named(body.model)
        messages = [message.plain() for message in body.messages]
        generations = await model.chat(messages, body.sampling(), body.form(), count=body.n)
        return await _answer(request, body, model, generations, CHAT)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Continue one text or several."""
        body: CompletionBody = await read(request, CompletionBody)
        model = self.named(body.model)
        options, prompts = body.sampling(), body.prompts()
        generations: list[Generation] = []
        try:
            for prompt in prompts:
                generations += await model.complete(prompt, options, count=body.n)
        except BaseException:
            _close(generations)
            raise
        return await _answer(request, body, model, generations, TEXT, prompts=len(prompts))

    async def embeddings(self, request: web.Request) -> web.Response:
        """A vector for each input."""
        body: EmbeddingsBody = await read(request, EmbeddingsBody)
        model = self.named(body.model)
        count = 0
        data = []
        for index, text in enumerate(body.inputs()):
            vector, tokens = await model.embed(text, truncate=body.truncate)
            if body.dimensions not in (None, len(vector)):
                raise UnsupportedField(
                    f"This model's embeddings have {len(vector)} dimensions; they cannot be cut to "
                    f"{body.dimensions}.",
                    param="dimensions",
                )
            count += tokens
            value = wording.embedding_value(vector, body.encoding_format)
            data.append({"object": "embedding", "index": index, "embedding": value})
        usage = {"prompt_tokens": count, "total_tokens": count}
        return json_response({"object": "list", "data": data, "model": model.info.name, "usage": usage})

    async def models(self, request: web.Request) -> web.Response:
        """The models that can answer now."""
        return json_response({"object": "list", "data": [self._card(self._current())]})

    async def model(self, request: web.Request) -> web.Response:
        """One model."""
        return json_response(self._card(self.named(request.match_info["name"])))

    def named(self, name: str | None) -> ServedModel:
        """The model of that name, or the one that is served. Raises NotFound or Unavailable."""
        model = self._current()
        if name is not None and name not in model.names:
            raise NotFound(
                f"The model {name!r} is not served here.", hint=f"Served: {model.info.name}.", param="model"
            )
        return model

    def _card(self, model: ServedModel) -> dict[str, Any]:
        info = model.info
        return {
            "id": info.name,
            "object": "model",
            "created": self._started,
            "owned_by": "local",
            "context_length": info.context,
            "architecture": info.architecture,
            "sha256": info.sha256,
            "capabilities": list(info.capabilities),
        }


async def _answer(
    request: web.Request,
    body: Body,
    model: ServedModel,
    generations: Sequence[Generation],
    words: Wording,
    *,
    prompts: int = 1,
) -> web.StreamResponse:
    answer = Answer(
        request=request,
        model=model.info.name,
        generations=generations,
        wording=words,
        prompts=prompts,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )
    try:
        return await answer.stream() if body.stream else await answer.whole()
    finally:
        _close(generations)  # a client that is gone frees its cells at the next step


def _close(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.close()


async def read(request: web.Request, kind: type[msgspec.Struct]) -> Any:
    """The request's body as `kind`. Raises RequestError naming what is wrong."""
    data = await request.read()
    if len(data) > LARGE_BODY:
        return await asyncio.to_thread(parse, data, kind)
    return parse(data, kind)


def json_response(body: dict[str, Any]) -> web.Response:
    """A 200 with a JSON body."""
    return web.Response(body=encode(body), content_type="application/json")
