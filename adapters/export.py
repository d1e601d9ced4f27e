"""Records of the journal as lines that `lessons.py` reads back: what to imitate, and what is better."""

from __future__ import annotations

from typing import Any, Literal

from lichen.adapters.records import Record

Form = Literal["chat", "preference"]


def line_of(record: Record, form: Form) -> dict[str, Any] | None:
    """One record in a form of OpenAI's fine-tuning files; None where it teaches nothing in that form.

    chat: the correction, or else an answer that was rated up; of a text the same as prompt and completion.
    preference: the correction beside the answer that it corrects.
    """
    return _preference(record) if form == "preference" else _example(record)


def _example(record: Record) -> dict[str, Any] | None:
    if record.correction is None and record.rating != "up":
        return None
    if record.kind == "text":
        completion = record.correction or record.answer["text"]
        return {"prompt": record.request["prompt"], "completion": completion} if completion else None
    answer = _message(record.answer) if record.correction is None else _corrected(record.correction)
    if not answer.get("content") and not answer.get("tool_calls"):
        return None
    return {**_request(record), "messages": [*_request(record)["messages"], answer]}


def _preference(record: Record) -> dict[str, Any] | None:
    if record.kind != "chat" or record.correction is None:
        return None
    asked, given = _request(record), _message(record.answer)
    empty = not given.get("content") and not given.get("tool_calls")
    if empty or given.get("content") == record.correction or asked["messages"][-1]["role"] == "assistant":
        return None
    return {
        "input": asked,
        "preferred_output": [_corrected(record.correction)],
        "non_preferred_output": [given],
    }


def _request(record: Record) -> dict[str, Any]:
    messages = [_message(message) for message in record.request["messages"]]
    tools = record.request.get("tools")
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _corrected(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what only a streamed answer has."""
    if not message.get("tool_calls"):
        return message
    calls = [{name: call[name] for name in ("id", "type", "function")} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}
