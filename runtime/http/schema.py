"""Request bodies of the OpenAI API: strict structs, and a clear 400 for everything else.

A field is honoured, or named in an error; none is dropped in silence. `null` means "not given", as in
OpenAI's API. Fields that lichen does not honour are accepted only with the value that changes nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from lichen.errors import RequestError, UnsupportedField
from lichen.runtime.sequence import SamplingOptions

COMPLETION_TOKENS = 16  # OpenAI's default length for /v1/completions

# field -> values that change nothing (besides null); `...` means any value
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "web_search_options": (),
    # Labels for the provider's own bookkeeping; they never change an answer.
    "user": (...,),
    "metadata": (...,),
    "safety_identifier": (...,),
    "prompt_cache_key": (...,),
    "prompt_cache_retention": (...,),
}

T = TypeVar("T")
Count = Annotated[int, Meta(ge=1)]
KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]  # seconds; -1 for ever


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options` of a streamed request."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: meaningless on one machine


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and completion requests share."""

    model: str | None = None
    keep_alive: KeepAlive | None = None  # lichen's own: how long the model stays loaded afterwards
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def sampling(self) -> SamplingOptions:
        """The engine's options; what the request leaves out takes lichen's default."""
        names = SamplingOptions.__struct_fields__
        given = {name: getattr(self, name) for name in names if name not in {"stop", "logit_bias"}}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.stop is not None:
            options["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias is not None:
            options["logit_bias"] = _token_biases(self.logit_bias)
        return SamplingOptions(**options)

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true.", param="stream_options")


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """One text part of a message's content."""

    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates expect it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    def sampling(self) -> SamplingOptions:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise RequestError(
                    "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens"
                )
            self.max_tokens = self.max_completion_tokens
        return super().sampling()


class CompletionBody(Body, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`; the prompt is a text, or token ids."""

    prompt: str | list[str | int]

    def one_prompt(self) -> str | list[int]:
        """The prompt; a list of one text is that text."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [item for item in self.prompt if isinstance(item, str)]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if len(self.prompt) == 1 and texts:
            return texts[0]
        if texts:
            raise UnsupportedField("lichen takes one prompt a request.", param="prompt")
        return tokens

    def sampling(self) -> SamplingOptions:
        if self.max_tokens is None:
            self.max_tokens = COMPLETION_TOKENS
        return super().sampling()


def parse(body: bytes, kind: type[T]) -> T:
    """Decode a JSON body. Raises RequestError or UnsupportedField naming the field."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise RequestError("The body is not valid UTF-8.") from error
    if not isinstance(raw, dict):
        raise RequestError("The body must be a JSON object.")
    try:
        return msgspec.convert(_without_effect_removed(raw), kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error


def _without_effect_removed(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in raw.items():
        if value is None:
            continue
        allowed = _WITHOUT_EFFECT.get(name)
        if allowed is None:
            kept[name] = value
        elif ... not in allowed and not any(type(value) is type(a) and value == a for a in allowed):
            raise UnsupportedField(f"lichen does not support {name} with this value.", param=name)
    messages = kept.get("messages")
    if isinstance(messages, list):  # clients send back our own messages, with their null fields
        kept["messages"] = [
            {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages
        ]
    return kept


def _explained(text: str) -> RequestError:
    """msgspec's message with the field that it points to."""
    reason, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if unknown := re.search(r"unknown field `(.*?)`", reason):
        param = f"{path}.{unknown[1]}" if path else unknown[1]
        return UnsupportedField(f"lichen does not know the field {param}.", param=param)
    if missing := re.search(r"missing required field `(.*?)`", reason):
        param = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"The field {param} is required.", param=param)
    where = f" in {path}" if path else ""
    return RequestError(f"{reason}{where}.", param=path or None)


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError as error:
        raise RequestError("logit_bias must map token ids to numbers.", param="logit_bias") from error
