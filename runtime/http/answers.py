"""Answers of the OpenAI routes, whole or as server-sent events, from one or more generations.

`Chat` and `Text` know how their route words a choice; the rest is the same for both.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
from aiohttp import web

import lichen
from lichen.errors import LichenError
from lichen.runtime.answer import Part
from lichen.runtime.generation import Generation
from lichen.runtime.http import wording
from lichen.runtime.http.access_log import log_adapter
from lichen.runtime.http.guard import error_body
from lichen.runtime.sequence import Finished, Piece, Prefill, TokenLogprob

KeepAnswers = Callable[[str, list[dict[str, Any]]], None]  # gets the response's id, and each choice's answer

HEARTBEAT_S = 10.0  # a comment after so much silence, so that proxies keep the connection

encode = msgspec.json.encode


class ChatChoice:
    """A choice of a chat completion."""

    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}
    closing: ClassVar[dict[str, Any]] = {"delta": {}}

    def __init__(self, generation: Generation) -> None:
        assert generation.reader is not None, "chat answers have a reader"
        self._reader = generation.reader
        self._logprobs = generation.sequence.options.top_logprobs is not None
        self._message = wording.Message()
        self._pending: list[TokenLogprob] = []
        self._tokens: list[TokenLogprob] = []

    def feed(self, piece: Piece) -> list[dict[str, Any]]:
        self._pending += piece.tokens
        return self._shown(self._reader.feed(piece.text))

    def flush(self, finished: Finished) -> list[dict[str, Any]]:
        shown = self._shown(self._reader.flush(cut=finished.reason == "length"))
        if self._pending:
            shown.append({"delta": {}, "logprobs": self._taken()})
        return shown

    def whole(self) -> dict[str, Any]:
        logprobs = wording.chat_logprobs(self._tokens) if self._logprobs else None
        return {"message": self._message.plain(), "logprobs": logprobs}

    def said(self) -> dict[str, Any]:
        message = self._message.plain()
        del message["refusal"]
        return message

    def reason(self, finished: Finished) -> str:
        return wording.finish_reason(finished, self._reader.calls)

    def _shown(self, parts: list[Part]) -> list[dict[str, Any]]:
        self._message.add(parts)
        shown: list[dict[str, Any]] = [{"delta": wording.delta(part)} for part in parts]
        if shown and self._pending:
            shown[0]["logprobs"] = self._taken()
        return shown

    def _taken(self) -> dict[str, Any]:
        taken, self._pending = self._pending, []
        self._tokens += taken
        return wording.chat_logprobs(taken)


class TextChoice:
    """A choice of a completion."""

    opening: ClassVar[dict[str, Any] | None] = None
    closing: ClassVar[dict[str, Any]] = {"text": ""}

    def __init__(self, generation: Generation) -> None:
        self._logprobs = generation.sequence.options.top_logprobs is not None
        self._parts: list[str] = []
        self._length = 0
        self._tokens: list[TokenLogprob] = []

    def feed(self, piece: Piece) -> list[dict[str, Any]]:
        shown: dict[str, Any] = {"text": piece.text}
        if self._logprobs:
            start = sum(len(token.text.decode("utf-8", "replace")) for token in self._tokens)
            shown["logprobs"] = wording.text_logprobs(piece.tokens, start)
            self._tokens += piece.tokens
        self._parts.append(piece.text)
        return [shown]

    def flush(self, finished: Finished) -> list[dict[str, Any]]:
        return []

    def whole(self) -> dict[str, Any]:
        logprobs = wording.text_logprobs(self._tokens, 0) if self._logprobs else None
        return {"text": "".join(self._parts), "logprobs": logprobs}

    def said(self) -> dict[str, Any]:
        return {"text": "".join(self._parts)}

    def reason(self, finished: Finished) -> str:
        return finished.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How one route calls its answers."""

    prefix: str
    whole: str
    chunk: str
    choice: type[ChatChoice] | type[TextChoice]


CHAT = Wording(prefix="chatcmpl-", whole="chat.completion", chunk="chat.completion.chunk", choice=ChatChoice)
TEXT = Wording(prefix="cmpl-", whole="text_completion", chunk="text_completion", choice=TextChoice)


@dataclass(slots=True, kw_only=True)
class Answer:
    """One response to a request: `generations` of `prompts` prompts, in order. keep: called once complete.
    show_drafts: events whose token had been guessed say so."""

    request: web.Request
    model: str
    generations: Sequence[Generation]
    wording: Wording
    prompts: int = 1
    include_usage: bool = False
    show_drafts: bool = False
    keep: KeepAnswers | None = None
    id: str = field(init=False)
    created: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.wording.prefix + secrets.token_hex(12)
        log_adapter(self.generations[0].sequence.adaptation)

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that begin every object of this answer."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"lichen-{lichen.__version__}",
            **wording.adapter_json(self.generations[0].sequence.adaptation),
        }

    async def whole(self) -> web.Response:
        """Wait for everything, then answer at once."""
        choices = []
        said = []
        ends: list[Finished] = []
        for index, generation in enumerate(self.generations):
            choice = self.wording.choice(generation)
            async for event in generation:
                if isinstance(event, Piece):
                    choice.feed(event)
            finished = _finished(generation)
            choice.flush(finished)
            ends.append(finished)
            said.append(choice.said())
            choices.append({"index": index, **choice.whole(), "finish_reason": choice.reason(finished)})
        usage = wording.usage_json(wording.usage_of(ends, prompts=self.prompts))
        body = {
            **self.head(self.wording.whole),
            "choices": choices,
            "usage": usage,
            "timings": wording.timings_json(ends[0]),
        }
        if self.keep is not None:
            self.keep(self.id, said)
        return web.Response(body=encode(body), content_type="application/json")

    async def stream(self) -> web.StreamResponse:
        """Send events while the answers are written."""
        return await _Stream(self).send()


class _Stream:
    """An answer as server-sent events, chunk for chunk as OpenAI's clients expect them."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._head = answer.head(answer.wording.chunk)
        self._choices = [answer.wording.choice(generation) for generation in answer.generations]
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )

    async def send(self) -> web.StreamResponse:
        """Write events until all answers end; an error after the first byte is sent as an event."""
        answer, response = self._answer, self._response
        await response.prepare(answer.request)
        try:
            await self._all()
            if answer.keep is not None:  # before the last byte, so that feedback on it finds it
                answer.keep(answer.id, [choice.said() for choice in self._choices])
            if answer.include_usage:
                ends = [_finished(generation) for generation in answer.generations]
                usage = wording.usage_json(wording.usage_of(ends, prompts=answer.prompts))
                await response.write(
                    b"data: " + encode({**self._head, "choices": [], "usage": usage}) + b"\n\n"
                )
            await response.write(b"data: [DONE]\n\n")
        except LichenError as error:
            await response.write(b"data: " + encode(error_body(error)) + b"\n\n")
        except ConnectionError:  # the client is gone; the generations are closed by the caller
            return response
        await response.write_eof()
        return response

    async def _all(self) -> None:
        generations = self._answer.generations
        if len(generations) == 1:
            return await self._one(0, generations[0])
        pumps = [asyncio.ensure_future(self._one(*pair)) for pair in enumerate(generations)]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _one(self, index: int, generation: Generation) -> None:
        """Write the events of one choice."""
        choice = self._choices[index]
        write = self._response.write
        before, after = self._frame(index, choice)
        if choice.opening is not None:
            await write(self._chunk(index, choice.opening))
        while not generation.done:
            event = await generation.next(HEARTBEAT_S)
            if isinstance(event, Piece):
                marked = self._answer.show_drafts and event.drafted
                more: dict[str, Any] = {"lichen": {"drafted": True}} if marked else {}
                for shown in choice.feed(event):
                    text = None if marked else _plain_text(shown)
                    plain = text is not None
                    await write(before + encode(text) + after if plain else self._chunk(index, shown, **more))
            elif isinstance(event, Prefill):
                if index == 0:
                    await write(b": prefill %d/%d\n\n" % (event.done, event.total))
            elif event is None:
                await write(b": waiting\n\n")
        finished = _finished(generation)
        for shown in choice.flush(finished):
            await write(self._chunk(index, shown))
        timings = wording.timings_json(finished)
        await write(self._chunk(index, choice.closing, reason=choice.reason(finished), timings=timings))

    def _frame(self, index: int, choice: ChatChoice | TextChoice) -> tuple[bytes, bytes]:
        """What stands around a plain piece of text, so that nothing else is encoded for each token."""
        marker = "\x00"
        shown = {"delta": {"content": marker}} if isinstance(choice, ChatChoice) else {"text": marker}
        before, _, after = self._chunk(index, shown).partition(encode(marker))
        return before, after

    def _chunk(self, index: int, shown: dict[str, Any], *, reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "logprobs": None, **shown, "finish_reason": reason}
        chunk: dict[str, Any] = {**self._head, "choices": [choice], **more}
        if self._answer.include_usage:
            chunk["usage"] = None
        return b"data: " + encode(chunk) + b"\n\n"


def _plain_text(shown: dict[str, Any]) -> str | None:
    """The text of a chunk that has nothing else, or None."""
    if "logprobs" in shown:
        return None
    text: str | None = shown["text"] if "text" in shown else shown["delta"].get("content")
    return text


def _finished(generation: Generation) -> Finished:
    assert generation.finished is not None, "events end with Finished, or an error was raised"
    return generation.finished
