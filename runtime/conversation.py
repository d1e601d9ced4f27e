"""A conversation as a model's chat template takes it, with tools where the template knows none.

A template that has a `tools` variable gets them as they are. For any other the same facts become text: the
tools a system message, a call what the model would have written, a result a user message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lichen.errors import RequestError
from lichen.runtime.tools import Tool, ToolFormat, instructions

Message = Mapping[str, Any]


def native_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """For a template that knows tools: arguments of calls as objects, as such templates expect them."""
    return [_with_objects(message) if message.get("tool_calls") else dict(message) for message in messages]


def textual_messages(
    messages: Sequence[Message], tools: Sequence[Tool], form: ToolFormat
) -> list[dict[str, Any]]:
    """For a template that knows none."""
    plain = [_textual(message, form) for message in messages]
    if not tools:
        return plain
    taught = instructions(tools, form)
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{taught}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": taught}, *plain]


def _with_objects(message: Message) -> dict[str, Any]:
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": _arguments(function["arguments"])}})
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError("The arguments of a tool call are not JSON.", param="messages") from error


def _textual(message: Message, form: ToolFormat) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        form.written(call["function"]["name"], json.dumps(_arguments(call["function"]["arguments"])))
        for call in message.get("tool_calls") or ()
    ]
    kept = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    return {**kept, "content": "\n".join(filter(None, (content, *calls)))}
