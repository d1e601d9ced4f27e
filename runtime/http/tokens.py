"""Routes that show what a model sees: `/tokenize`, `/detokenize` and `/apply-template`, as llama-server's."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.http.openai import Use, json_response, read
from lichen.runtime.http.schema import DetokenizeBody, TemplateBody, TokenizeBody


class TokenRoutes:
    """The handlers, over the model that a request names."""

    def __init__(self, use: Use) -> None:
        self._use = use

    def routes(self) -> list[web.RouteDef]:
        """Route table for `Application.add_routes`."""
        return [
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
            web.post("/apply-template", self.apply_template),
        ]

    async def tokenize(self, request: web.Request) -> web.Response:
        """A text's token ids, with their bytes if they are asked for."""
        body: TokenizeBody = await read(request, TokenizeBody)
        async with self._use(body.model, None) as model:
            tokens = await asyncio.to_thread(model.tokenize, body.content, add_bos=body.add_special)
            if not body.with_pieces:
                return json_response({"tokens": tokens})
            pieces = [{"id": token, "piece": _piece(model.piece(token))} for token in tokens]
            return json_response({"tokens": pieces})

    async def detokenize(self, request: web.Request) -> web.Response:
        """The text of token ids."""
        body: DetokenizeBody = await read(request, DetokenizeBody)
        async with self._use(body.model, None) as model:
            data = b"".join(model.piece(token) for token in body.tokens)
            return json_response({"content": data.decode("utf-8", "replace")})

    async def apply_template(self, request: web.Request) -> web.Response:
        """The prompt text of a conversation."""
        body: TemplateBody = await read(request, TemplateBody)
        messages = [message.plain() for message in body.messages]
        form = AnswerForm(tools=tuple(spec.tool() for spec in body.tools))
        async with self._use(body.model, None) as model:
            return json_response({"prompt": await asyncio.to_thread(model.prompt_text, messages, form)})


def _piece(data: bytes) -> Any:
    """Text where it is text, else a list of bytes, as llama-server writes it."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)
