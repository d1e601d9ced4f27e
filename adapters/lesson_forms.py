"""One line of a file of lessons: its three forms, and what may be wrong with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lichen.adapters.records import LessonKind

Name = Annotated[str, Meta(max_length=256)]


class LineFault(Exception):
    """What is wrong with a line, and what to do about it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """A part of a message's content; others than text cannot be learned from here."""

    text: str


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """A call as the model made it; `arguments` is JSON text."""

    name: Name
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One tool call of an answer."""

    id: Name
    function: CalledFunction
    type: Literal["function"] = "function"


class LessonMessage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One message. weight: 0 for an answer of the assistant that is context and not taught."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    weight: Literal[0, 1] | None = None

    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text(),
        }
        if self.tool_calls:
            message["tool_calls"] = [
                {**msgspec.to_builtins(call), "type": "function"} for call in self.tool_calls
            ]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


class _Chat(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[LessonMessage]
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None


class _Completion(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    completion: str


class _Preference(msgspec.Struct, forbid_unknown_fields=True):
    input: _Chat
    preferred_output: list[LessonMessage]
    non_preferred_output: list[LessonMessage]


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """A question and its answer, or two of which the first is better.

    messages: of a chat the whole conversation, answers included (with `weight` where given); of a
    preference pair what comes before the answers. preferred, rejected: of a pair alone.
    prompt, completion: of a completion alone.
    """

    kind: LessonKind
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    preferred: tuple[dict[str, Any], ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""

    def question(self) -> bytes:
        """What comes before the last answer, in one canonical form: key order and white space are lost."""
        if self.kind == "completion":
            return _canonical(self.prompt)
        messages = self.messages if self.kind == "preference" else self.messages[:-1]
        return _canonical([messages, self.tools])

    def answer(self) -> bytes:
        """The rest of it, in the same form."""
        if self.kind == "completion":
            return _canonical(self.completion)
        return _canonical([self.messages[-1], self.preferred, self.rejected])


def lesson_of(line: bytes) -> Lesson:
    """The lesson of one line of UTF-8. Raises LineFault."""
    try:
        raw = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise LineFault(f"it is not JSON: {_short(error)}", "write one JSON object a line") from error
    if not isinstance(raw, dict):
        raise LineFault("it is not a JSON object", "write one JSON object a line")
    raw = {name: value for name, value in raw.items() if value is not None}
    try:
        if "messages" in raw:
            return _chat(msgspec.convert(raw, _Chat))
        if "prompt" in raw or "completion" in raw:
            return _completion(raw)
        if {"input", "preferred_output", "non_preferred_output"} & raw.keys():
            return _preference(msgspec.convert(raw, _Preference))
    except msgspec.ValidationError as error:
        raise LineFault(_short(error), "see docs/guides/feedback.md for the three forms") from error
    raise LineFault(
        "it is no lesson",
        "give messages, or prompt and completion, or input with preferred_output and non_preferred_output",
    )


def _completion(raw: dict[str, Any]) -> Lesson:
    if "completion" not in raw:
        raise LineFault("it has a prompt but no completion to learn", "add completion, the text to learn")
    read = msgspec.convert(raw, _Completion)
    if not read.completion:
        raise LineFault("its completion is empty", "write what the model should have said")
    return Lesson(kind="completion", prompt=read.prompt, completion=read.completion)


def _chat(read: _Chat) -> Lesson:
    _check_order(read.messages)
    if not any(message.role == "assistant" and message.weight != 0 for message in read.messages):
        raise LineFault(
            "it has no answer to learn", "add a message of the role assistant whose weight is not 0"
        )
    if read.messages[-1].role != "assistant":
        raise LineFault(
            f"its last message is of the role {read.messages[-1].role}", "end it with one of the assistant"
        )
    messages = tuple(
        {**message.plain(), **({} if message.weight is None else {"weight": message.weight})}
        for message in read.messages
    )
    return Lesson(kind="chat", messages=messages, tools=tuple(read.tools or ()))


def _preference(read: _Preference) -> Lesson:
    _check_order(read.input.messages)
    if read.input.messages[-1].role not in ("user", "tool"):
        raise LineFault(
            "its input does not end with a message of the user or a tool",
            "move the answers to preferred_output and non_preferred_output",
        )
    for name, output in (
        ("preferred_output", read.preferred_output),
        ("non_preferred_output", read.non_preferred_output),
    ):
        _check_order(output, of=name)
        if len(output) != 1 or output[0].role != "assistant":
            raise LineFault(f"{name} is not one message of the assistant", "give exactly one")
    preferred, rejected = read.preferred_output[0].plain(), read.non_preferred_output[0].plain()
    if preferred == rejected:
        raise LineFault("both outputs are the same", "give two that differ")
    return Lesson(
        kind="preference",
        messages=tuple(message.plain() for message in read.input.messages),
        tools=tuple(read.input.tools or ()),
        preferred=(preferred,),
        rejected=(rejected,),
    )


def _check_order(messages: list[LessonMessage], of: str = "messages") -> None:
    """Rules that every list of messages keeps. Raises LineFault."""
    if not messages:
        raise LineFault(f"{of} is empty", "give at least one message")
    for number, message in enumerate(messages, 1):
        if message.role == "assistant":
            if not message.text() and not message.tool_calls:
                raise LineFault(f"answer {number} of {of} is empty", "give its content or its tool_calls")
            continue
        if message.weight is not None:
            raise LineFault(f"message {number} of {of} has a weight", "only the assistant's can have one")
        if message.tool_calls:
            raise LineFault(f"message {number} of {of} calls tools", "only the assistant's can call them")
        if message.content is None:
            raise LineFault(f"message {number} of {of} has no content", "give its content")


def _canonical(value: object) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:159] + "…"
