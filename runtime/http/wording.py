"""How OpenAI words answers: messages, deltas, log-probabilities and usage as plain dictionaries."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from lichen.runtime.adaptation import Adaptation
from lichen.runtime.answer import CallArguments, CallBegins, Part, Said, Thought
from lichen.runtime.sequence import Finished, Timings, TokenLogprob, Usage


class Message:
    """A chat message that is put together from its parts."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._thought: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, parts: Iterable[Part]) -> None:
        """Append parts in their order."""
        for part in parts:
            if isinstance(part, Said):
                self._said.append(part.text)
            elif isinstance(part, Thought):
                self._thought.append(part.text)
            elif isinstance(part, CallBegins):
                function = {"name": part.name, "arguments": ""}
                self._calls.append({"id": part.id, "type": "function", "function": function})
            else:
                self._calls[part.index]["function"]["arguments"] += part.text

    def plain(self) -> dict[str, Any]:
        """The message as it stands in a whole answer."""
        content = "".join(self._said)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        if self._thought:
            message["reasoning_content"] = "".join(self._thought)
        return message


def delta(part: Part) -> dict[str, Any]:
    """One part as a streamed delta."""
    match part:
        case Said(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case CallBegins(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def finish_reason(finished: Finished, calls: int) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if calls and finished.reason == "stop" else finished.reason


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as a chat choice carries them."""

    def entry(text: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(text)}

    content = [
        {
            **entry(token.text, token.logprob),
            "top_logprobs": [entry(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any]:
    """Log-probabilities as a completion choice carries them. start: characters of text before these."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text.decode("utf-8", "replace"))
    return {
        "tokens": [token.text.decode("utf-8", "replace") for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {text.decode("utf-8", "replace"): logprob for _, text, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def usage_of(all_finished: Sequence[Finished], *, prompts: int) -> Usage:
    """Usage of several answers; each of `prompts` prompts is counted once, whatever the number of answers."""
    firsts = all_finished[:: max(1, len(all_finished) // prompts)]
    return Usage(
        prompt_tokens=sum(finished.usage.prompt_tokens for finished in firsts),
        completion_tokens=sum(finished.usage.completion_tokens for finished in all_finished),
        cached_tokens=sum(finished.usage.cached_tokens for finished in firsts),
    )


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
        "draft_n": timings.draft_n,
        "draft_n_accepted": timings.draft_n_accepted,
        "cached_tokens": finished.usage.cached_tokens,
    }


def adapter_json(adaptation: Adaptation) -> dict[str, Any]:
    """lichen's own addition to an answer: which adapter it was made with, if any, and how strongly."""
    if not adaptation:
        return {}
    return {"adapter": {"sha256": adaptation.digest, "scale": adaptation.scale}}


def embedding_value(vector: list[float], form: str) -> list[float] | str:
    """A vector as numbers, or as base64 of its little-endian float32."""
    if form == "float":
        return vector
    import array
    import sys

    packed = array.array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()
