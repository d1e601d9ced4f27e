"""What one streamed answer says: tokens, text, and when each piece came. Parsed after the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.stream import Event, Exchange, StreamError, parse_response


class AnswerError(ValueError):
    """The server refused, broke off, or sent something that is not an OpenAI stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. Times in seconds.

    ttft: request to first text. gaps: between pieces of text that follow each other. total: request to
    the end. `counted`: completion_tokens is the number of pieces, since the server sent no usage.
    """

    ttft: float
    gaps: tuple[float, ...]
    total: float
    text: str
    completion_tokens: int
    prompt_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    counted: bool

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one; None for a single token."""
        spent = sum(self.gaps)
        return (self.completion_tokens - 1) / spent if spent > 0 and self.completion_tokens > 1 else None


def read_answer(exchange: Exchange) -> Answer:
    """The answer in a recorded exchange. Raises AnswerError with the server's own words where it sent some."""
    if exchange.error is not None:
        raise AnswerError(exchange.error)
    try:
        response = parse_response(exchange.arrivals)
    except StreamError as error:
        raise AnswerError(str(error)) from error
    if response.status != 200:
        raise AnswerError(f"HTTP {response.status}: {response.body[:300].decode('utf-8', 'replace')}")
    return _collect(exchange, list(response.events()))


def _collect(exchange: Exchange, events: Sequence[Event]) -> Answer:
    if not events or events[-1].data != b"[DONE]":
        raise AnswerError(f"the stream ended without [DONE] after {len(events)} events")
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    reason: str | None = None
    for event in events[:-1]:
        chunk = _json_object(event.data)
        if "error" in chunk:
            raise AnswerError(f"an error in the middle of the stream: {chunk['error']}")
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            reason = choice.get("finish_reason") or reason
            if text:
                times.append(event.at)
                texts.append(text)
    if not times:
        raise AnswerError("the answer has no text")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        ttft=times[0] - exchange.started,
        gaps=tuple(after - before for before, after in pairwise(times)),
        total=exchange.finished - exchange.started,
        text="".join(texts),
        completion_tokens=int(usage.get("completion_tokens", len(times))),
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=details.get("cached_tokens"),
        finish_reason=reason,
        counted="completion_tokens" not in usage,
    )


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise AnswerError(f"an event that is not JSON: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise AnswerError(f"an event that is not an object: {data[:80]!r}")
    return value
