"""OpenAI's routes: chat completions, completions, embeddings and models.

The path of a request: `chat_completions` here, `ServedModel.chat`, `Engine.submit`, `Engine._step`,
`native.Context.decode`; its events come back through the `Generation`s that `ServedModel.chat` returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from aiohttp import web

from lichen.errors import NotFound
from lichen.runtime.generation import Generation
from lichen.runtime.http import wording
from lichen.runtime.http.access_log import log_adapter
from lichen.runtime.http.answers import CHAT, TEXT, Answer, KeepAnswers, Wording
from lichen.runtime.http.guard import owner
from lichen.runtime.http.keeping import Keeping
from lichen.runtime.http.schema import Body, ChatBody, CompletionBody, EmbeddingsBody, parse
from lichen.runtime.resident import Candidate, ModelStatus
from lichen.runtime.served_model import ServedModel

LARGE_BODY = 1 << 18  # bytes; parsed off the event loop

encode = msgspec.json.encode


Use = Callable[[str | None, float | None], AbstractAsyncContextManager[ServedModel]]


class OpenAIRoutes:
    """The handlers. use: holds a model by name, loading it if need be. known and loaded: for the list.
    keeping: takes the answers that are to be kept."""

    def __init__(
        self,
        use: Use,
        known: Callable[[], Awaitable[list[Candidate]]],
        loaded: Callable[[], list[ModelStatus]],
        keeping: Keeping,
    ) -> None:
        self._use = use
        self._known = known
        self._loaded = loaded
        self._keeping = keeping
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
        messages = [message.plain() for message in body.messages]
        kept = self._keeping.of_chat(body, messages)
        async with self._use(body.model, body.keep_alive) as model:
            generations = await model.chat(
                messages, body.sampling(), body.form(), count=body.n, owner=owner(), kept=bool(kept)
            )
            keep = self._keeping.keeper(request, kept, model, generations[0].sequence.adaptation)
            return await _answer(request, body, model, generations, CHAT, keep=keep)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Continue one text or several."""
        body: CompletionBody = await read(request, CompletionBody)
        options, prompts = body.sampling(), body.prompts()
        kept = self._keeping.of_text(body, prompts)
        generations: list[Generation] = []
        async with self._use(body.model, body.keep_alive) as model:
            try:
                for prompt in prompts:
                    generations += await model.complete(
                        prompt, options, count=body.n, owner=owner(), kept=bool(kept)
                    )
            except BaseException:
                _close(generations)
                raise
            keep = self._keeping.keeper(request, kept, model, generations[0].sequence.adaptation)
            return await _answer(request, body, model, generations, TEXT, prompts=len(prompts), keep=keep)

    async def embeddings(self, request: web.Request) -> web.Response:
        """A vector for each input."""
        body: EmbeddingsBody = await read(request, EmbeddingsBody)
        count = 0
        data = []
        async with self._use(body.model, body.keep_alive) as model:
            for index, text in enumerate(body.inputs()):
                vector, tokens = await model.embed(text, truncate=body.truncate, dimensions=body.dimensions)
                count += tokens
                value = wording.embedding_value(vector, body.encoding_format)
                data.append({"object": "embedding", "index": index, "embedding": value})
            usage = {"prompt_tokens": count, "total_tokens": count}
            log_adapter(model.adaptation)
            head = {"object": "list", "model": model.info.name, **wording.adapter_json(model.adaptation)}
            return json_response({**head, "data": data, "usage": usage})

    async def models(self, request: web.Request) -> web.Response:
        """All models that can answer, loaded or not, the default one first."""
        return json_response({"object": "list", "data": await self._cards()})

    async def model(self, request: web.Request) -> web.Response:
        """One model."""
        name = request.match_info["name"]
        cards = await self._cards()
        for card in cards:
            if name == card["id"] or (name == "default" and card is cards[0]):
                return json_response(card)
        there = ", ".join(card["id"] for card in cards)
        raise NotFound(f"The model {name!r} is not here.", hint=f"Served: {there}.", param="model")

    async def _cards(self) -> list[dict[str, Any]]:
        loaded = {status.name: status for status in self._loaded() if status.state == "ready"}
        known = {candidate.name: candidate for candidate in await self._known()}
        names = list(known) or list(loaded)
        bases = {name: known[name].base or name if name in known else name for name in names}
        return [self._card(name, known.get(name), loaded.get(bases[name])) for name in names]

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
            "capabilities": list(there.capabilities),
        }
        if known is not None and known.base:
            there_too = loaded is not None and known.adapter in {one.sha256 for one in loaded.adapters}
            card |= {"base": known.base, "adapter": known.adapter or None}
            card["loaded"] = loaded is not None and (there_too or not known.adapter)
        return {**card, "context_length": loaded.context} if loaded else card


async def _answer(
    request: web.Request,
    body: Body,
    model: ServedModel,
    generations: Sequence[Generation],
    words: Wording,
    *,
    prompts: int = 1,
    keep: KeepAnswers | None = None,
) -> web.StreamResponse:
    answer = Answer(
        request=request,
        model=model.info.name,
        generations=generations,
        wording=words,
        prompts=prompts,
        keep=keep,
        show_drafts=body.show_drafts,
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


def json_response(body: dict[str, Any], *, status: int = 200) -> web.Response:
    """An answer with a JSON body."""
    return web.Response(body=encode(body), content_type="application/json", status=status)
