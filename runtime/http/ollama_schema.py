"""Request bodies of Ollama's API: strict structs, as for OpenAI's.

Options that only concern how the work is done (threads, batch, GPU layers) are accepted and have no effect:
they change no answer. Every other option is honoured or named in an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lichen.errors import RequestError, UnsupportedField
from lichen.runtime.answer_form import AnswerForm, Schema
from lichen.runtime.grammar import JSON_OBJECT
from lichen.runtime.http.schema import Count, ToolSpec
from lichen.runtime.sampling import PENALTY_WINDOW
from lichen.runtime.sequence import SamplingOptions

KeepAlive = float | str | None
_NEUTRAL: dict[str, float | bool] = {
    "mirostat": 0,
    "tfs_z": 1,
    "typical_p": 1,
    "repeat_last_n": PENALTY_WINDOW,
    "penalize_newline": True,
}
_DRAWN = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "seed")


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`options` of a request."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_ctx: Count | None = None
    mirostat: float | None = None
    mirostat_eta: float | None = None
    mirostat_tau: float | None = None
    tfs_z: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    penalize_newline: bool | None = None
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    main_gpu: int | None = None
    numa: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    vocab_only: bool | None = None

    def sampling(self, context: int) -> SamplingOptions:
        """The engine's options. Raises RequestError for what the loaded model or lichen cannot honour."""
        for name, neutral in _NEUTRAL.items():
            if getattr(self, name) not in (None, neutral):
                raise UnsupportedField(f"lichen does not support options.{name}.", param=f"options.{name}")
        if self.num_ctx is not None and self.num_ctx > context:
            raise RequestError(
                f"options.num_ctx is {self.num_ctx}, but this model was loaded with a context of {context}.",
                hint="Start lichen with a larger --context.",
                param="options.num_ctx",
            )
        given = {name: value for name in _DRAWN if (value := getattr(self, name)) is not None}
        if self.num_predict is not None and self.num_predict >= 0:
            given["max_tokens"] = self.num_predict
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return SamplingOptions(**given)


class OllamaFunction(msgspec.Struct):
    """The call in a message; `arguments` is an object."""

    name: str
    arguments: dict[str, Any] = {}


class OllamaCall(msgspec.Struct):
    """One call of an earlier answer."""

    function: OllamaFunction


class OllamaMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    images: list[Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it."""
        if self.images:
            raise UnsupportedField("lichen does not support images.", param="messages.images")
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": msgspec.json.encode(call.function.arguments).decode(),
                    },
                }
                for number, call in enumerate(self.tool_calls)
            ]
        if self.tool_name is not None:
            message["name"] = self.tool_name
        if self.thinking is not None:
            message["reasoning_content"] = self.thinking
        return message


class Asked(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and generate requests share."""

    model: str
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: Options | None = None
    stream: bool = True
    keep_alive: KeepAlive = None
    think: bool | str | None = None

    def schema(self) -> Schema:
        """The schema that `format` asks for."""
        return JSON_OBJECT if self.format == "json" else self.format or None

    def sampling(self, context: int) -> SamplingOptions:
        """The engine's options."""
        return (self.options or Options()).sampling(context)


class ChatRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/chat`."""

    messages: list[OllamaMessage] = []
    tools: list[ToolSpec] = []

    def form(self) -> AnswerForm:
        """What form the answer must have."""
        return AnswerForm(tools=tuple(spec.tool() for spec in self.tools), schema=self.schema())


class GenerateRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/generate`."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("suffix", "template", "context", "images"):
            if getattr(self, name):
                raise UnsupportedField(f"lichen does not support {name}.", param=name)


class EmbedRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/embed`. truncate: cut what is too long, which is this API's default."""

    model: str
    input: str | Annotated[list[str], Meta(max_length=2048)]
    truncate: bool = True
    dimensions: Count | None = None
    options: Options | None = None
    keep_alive: KeepAlive = None


class ModelRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/show` and `/api/pull`; older clients say `name`."""

    model: str | None = None
    name: str | None = None
    stream: bool = True
    verbose: bool = False
    insecure: bool = False

    def reference(self) -> str:
        """The model's name. Raises RequestError where there is none."""
        if not (wanted := self.model or self.name):
            raise RequestError("The field model is required.", param="model")
        if self.insecure:
            raise UnsupportedField("lichen does not support insecure.", param="insecure")
        return wanted
