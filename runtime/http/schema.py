"""Request bodies of the OpenAI API: strict structs, and a clear 400 for everything else.

A field is honoured, or named in an error; none is dropped in silence. `ignored.py` has the fields that are
accepted only with a value that changes nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from lichen.devices.intent import Intent
from lichen.errors import RequestError, UnsupportedField
from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.grammar import JSON_OBJECT
from lichen.runtime.http.ignored import REQUEST, Fields, message_removed, removed
from lichen.runtime.sequence import MAX_TOP_LOGPROBS, SamplingOptions
from lichen.runtime.tools import Tool

COMPLETION_TOKENS = 16  # OpenAI's default length for /v1/completions

MAX_CHOICES = 64
MAX_TOOLS = 128
MAX_INPUTS = 2048

T = TypeVar("T")
Count = Annotated[int, Meta(ge=1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Top = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]  # seconds; -1 for ever


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options` of a streamed request."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: meaningless on one machine


class LichenOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`lichen` of a request: what no other API has. intent: docs/guides/plan.md."""

    intent: Intent = "balanced"


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
    n: Choices = 1
    deterministic: bool = False  # lichen's own: docs/determinism.md
    store: bool | None = None  # keep the answer, or do not: docs/guides/feedback.md
    speculation: bool = True  # lichen's own: docs/speculation.md
    adapter_scale: float | None = None  # lichen's own: how strongly the adapter of MODEL:ADAPTER counts
    show_drafts: bool = False  # lichen's own: streamed events of guessed tokens carry lichen.drafted
    lichen: LichenOptions | None = None

    def sampling(self) -> SamplingOptions:
        """The engine's options; what the request leaves out takes lichen's default."""
        names = SamplingOptions.__struct_fields__
        given = {name: getattr(self, name, None) for name in names if name not in {"stop", "logit_bias"}}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.stop is not None:
            options["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.lichen is not None:
            options["intent"] = self.lichen.intent
            if self.lichen.intent == "battery":
                options["speculation"] = False  # wrong guesses cost work
        if self.logit_bias is not None:
            options["logit_bias"] = _token_biases(self.logit_bias)
        return SamplingOptions(**options)

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true.", param="stream_options")


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """One text part of a message's content."""

    text: str


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call as the model made it; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """One tool call of an earlier answer."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls:
            raise ValueError("Object missing required field `content`")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant can have `tool_calls`")

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.tool_calls:
            message["tool_calls"] = [msgspec.to_builtins(call) for call in self.tool_calls]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


class FunctionSpec(msgspec.Struct, forbid_unknown_fields=True):
    """A function that may be called; `parameters` is the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, forbid_unknown_fields=True):
    """One entry of `tools`."""

    function: FunctionSpec
    type: Literal["function"] = "function"

    def tool(self) -> Tool:
        """As the runtime knows it."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        return Tool(function.name, function.description or "", parameters, bool(function.strict))


class FunctionChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The name in a `tool_choice` that names one."""

    name: str


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """`tool_choice` that names the one function to call."""

    function: FunctionChoice
    type: Literal["function"] = "function"


class TextFormat(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """Any text."""


class JSONObjectFormat(msgspec.Struct, tag="json_object", tag_field="type", forbid_unknown_fields=True):
    """Any JSON object."""


class JSONSchema(msgspec.Struct, forbid_unknown_fields=True):
    """A named JSON schema. strict: false lets keywords that cannot be enforced pass."""

    name: str = "answer"
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class JSONSchemaFormat(msgspec.Struct, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    """JSON that a schema allows."""

    json_schema: JSONSchema


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Top | None = None
    tools: Annotated[list[ToolSpec], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | None = None

    def sampling(self) -> SamplingOptions:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise RequestError(
                    "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens"
                )
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true.", param="top_logprobs")
        top = (self.top_logprobs or 0) if self.logprobs else None
        return msgspec.structs.replace(super().sampling(), top_logprobs=top)

    def form(self) -> AnswerForm:
        """What form the answer must have. Raises RequestError for a choice that fits no tool."""
        tools = tuple(spec.tool() for spec in self.tools)
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise RequestError("Two tools have the same name.", param="tools")
        choice = self.tool_choice
        if choice is not None and choice != "none" and not tools:
            raise RequestError("tool_choice is only allowed with tools.", param="tool_choice")
        name = choice.function.name if isinstance(choice, ToolChoice) else choice or "auto"
        if isinstance(choice, ToolChoice) and name not in names:
            raise RequestError(f"tool_choice names {name!r}, which is not in tools.", param="tool_choice")
        wanted = self.response_format
        spec = wanted.json_schema if isinstance(wanted, JSONSchemaFormat) else None
        schema = JSON_OBJECT if isinstance(wanted, JSONObjectFormat) else spec.schema if spec else None
        if spec is not None and schema is None:
            raise RequestError(
                "The field response_format.json_schema.schema is required.", param="response_format"
            )
        return AnswerForm(
            tools=tools,
            tool_choice=name,
            named=isinstance(choice, ToolChoice),
            parallel=self.parallel_tool_calls,
            schema=schema,
            lenient=spec is not None and spec.strict is False,
        )


class CompletionBody(Body, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`; a prompt is a text or token ids, and there may be several."""

    prompt: str | list[str | int | list[int]]
    logprobs: Top | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each of which gets its own answers."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if len(tokens) == len(self.prompt):
            return [tokens]
        if tokens:
            raise RequestError("A list of prompts must not be mixed with token ids.", param="prompt")
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise RequestError(f"At most {MAX_CHOICES} answers are allowed.", param="prompt")
        return [item for item in self.prompt if not isinstance(item, int)]

    def sampling(self) -> SamplingOptions:
        if self.max_tokens is None:
            self.max_tokens = COMPLETION_TOKENS
        return msgspec.structs.replace(super().sampling(), top_logprobs=self.logprobs)


class EmbeddingsBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/embeddings`. truncate (lichen's own): cut an input that is too long, do not refuse it."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    truncate: bool = False
    keep_alive: KeepAlive | None = None

    def inputs(self) -> list[str | list[int]]:
        """The inputs, each of which gets a vector."""
        if isinstance(self.input, str):
            return [self.input]
        tokens = [item for item in self.input if isinstance(item, int)]
        if tokens and len(tokens) == len(self.input):
            return [tokens]
        if tokens or not self.input or len(self.input) > MAX_INPUTS:
            raise RequestError(
                f"input must be a text, token ids, or a list of 1 to {MAX_INPUTS} of either.", param="input"
            )
        return [item for item in self.input if not isinstance(item, int)]


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /tokenize`. add_special: also what the model wants at a text's start. with_pieces: also bytes."""

    content: str
    model: str | None = None
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


class TemplateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /apply-template`: the prompt text that a chat request with these fields would have."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: str | None = None
    tools: Annotated[list[ToolSpec], Meta(max_length=MAX_TOOLS)] = []


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
        return msgspec.convert(_without_effect_removed(raw, kind), kind)
    except msgspec.ValidationError as error:
        raise explained(str(error)) from error


def without_effect(kind: type) -> Fields:
    """Fields that a kind of body may carry with a value that changes nothing: OpenAI's, in its own bodies."""
    return REQUEST if issubclass(kind, Body | EmbeddingsBody) else {}


def _without_effect_removed(raw: dict[str, Any], kind: type) -> dict[str, Any]:
    kept = removed(raw, without_effect(kind))
    if isinstance(messages := kept.get("messages"), list):
        answered = issubclass(kind, ChatBody | TemplateBody)
        kept["messages"] = [message_removed(message, answered=answered) for message in messages]
    return kept


def explained(text: str) -> RequestError:
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
