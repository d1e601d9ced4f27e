"""From an answer's text to its parts: what is said, what is thought, and which tools are called.

Incremental: it holds back only what may still turn out to be a marker. The grammar (`grammar.py`) makes
sure that a call is well formed; where there is none, text that only looks like a call stays text. A call that
the limit on tokens cuts before its name is complete is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from lichen.runtime.text import overlap
from lichen.runtime.tools import LIST_BEGIN, LIST_BETWEEN, LIST_END, ToolFormat

THINK_BEGIN, THINK_END = "<think>", "</think>"


@dataclass(slots=True, frozen=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(slots=True, frozen=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(slots=True, frozen=True)
class CallBegins:
    """The model calls a tool; its arguments follow. index: 0 for the first call of the answer."""

    index: int
    id: str
    name: str


@dataclass(slots=True, frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Said | Thought | CallBegins | CallArguments
Thinking = Literal["open", "maybe"] | None
_State = Literal["before", "thinking", "gap", "text", "head", "arguments"]


class AnswerReader:
    """Splits one answer's text.

    tools: the format of calls, or None where the request has no tools. names: of the tools that may be
    called. only_calls: whether the grammar allows nothing but calls. thinking: "open" if the prompt already
    opened the thinking, "maybe" if the model may open it, None if it never does.
    """

    def __init__(
        self,
        *,
        tools: ToolFormat | None,
        thinking: Thinking,
        names: Collection[str] = (),
        only_calls: bool = False,
    ) -> None:
        self._tools = tools
        self._names = names
        self._only_calls = only_calls
        self._state: _State = "thinking" if thinking == "open" else "before" if thinking else "text"
        self._held = ""
        self._skipped = ""  # what stood before the head of a call, should it be none
        self._calls = 0
        self._depth = _JSONDepth()

    @property
    def calls(self) -> int:
        """Tool calls begun so far."""
        return self._calls

    def feed(self, text: str) -> list[Part]:
        """Parts that are certain after this text."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def flush(self, *, cut: bool) -> list[Part]:
        """What was held back, once no more text comes. cut: the limit on tokens ended the answer.

        A call that was cut before its name was complete is dropped: it is neither text nor a call.
        """
        held, self._held = self._held, ""
        if self._state in ("arguments", "gap") or self._is_cut_call(held, cut=cut):
            return []
        if self._state == "head" and self._tools is not None:
            held = self._skipped + held  # a call that never was one
        if not held:
            return []
        return [Thought(held) if self._state == "thinking" else Said(held)]

    def _is_cut_call(self, held: str, *, cut: bool) -> bool:
        """Whether what was held back is the beginning of a call, and no text that only looks like one."""
        if self._tools is None or self._state == "thinking":
            return False
        if self._only_calls:
            return True
        heads = (self._tools.head(name) for name in self._names)
        return cut and self._state == "head" and any(head.startswith(held.lstrip(" ")) for head in heads)

    def _step(self, parts: list[Part]) -> bool:
        """One transition; False when more text is needed."""
        match self._state:
            case "before":
                return self._before()
            case "thinking":
                return self._until(THINK_END, Thought, "gap", parts)
            case "gap":  # white space behind thinking or a call means nothing
                self._held = self._held.lstrip()
                self._state = "text" if self._held else "gap"
                return bool(self._held)
            case "text":
                marker = self._tools.marker if self._tools is not None else ""
                return self._until(marker, Said, "head", parts)
            case "head":
                return self._head(parts)
            case "arguments":
                return self._arguments(parts)

    def _before(self) -> bool:
        opened = self._held.lstrip()
        if opened.startswith(THINK_BEGIN):
            self._held = opened[len(THINK_BEGIN) :]
            self._state = "thinking"
            return True
        if opened and not THINK_BEGIN.startswith(opened):
            self._state = "text"
            return True
        return False

    def _until(self, marker: str, kind: type[Said | Thought], then: _State, parts: list[Part]) -> bool:
        """Give out text up to a marker, and go on behind it."""
        at = self._held.find(marker) if marker else -1
        if at >= 0:
            shown, self._held, self._state = self._held[:at], self._held[at + len(marker) :], then
            self._skipped = marker
        else:
            keep = overlap(self._held, marker)
            cut = len(self._held) - keep
            shown, self._held = self._held[:cut], self._held[cut:]
        if shown:
            parts.append(kind(shown))
        return at >= 0

    def _head(self, parts: list[Part]) -> bool:
        form = self._tools
        assert form is not None, "only a format leads here"
        if form.listed and self._skipped == form.marker:
            opened = self._held.lstrip(" ")
            if not opened:
                return False
            if not opened.startswith(LIST_BEGIN):
                return self._no_call(parts)
            at = len(self._held) - len(opened) + len(LIST_BEGIN)
            self._skipped += self._held[:at]
            self._held = self._held[at:]
        if not self._held.startswith(form.before_name[: len(self._held)]):
            return self._no_call(parts)
        end = self._held.find(form.before_arguments, len(form.before_name))
        if end < 0:
            return False
        try:
            name = json.loads(f'"{self._held[len(form.before_name) : end]}"')
        except ValueError:
            return self._no_call(parts)
        self._held = self._held[end + len(form.before_arguments) :]
        parts.append(CallBegins(self._calls, form.new_id(), name))
        self._calls += 1
        self._state, self._depth = "arguments", _JSONDepth()
        return True

    def _no_call(self, parts: list[Part]) -> bool:
        assert self._tools is not None, "only a format leads here"
        parts.append(Said(self._skipped))
        self._state = "text"
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        assert self._tools is not None, "only a format leads here"
        if not self._depth.closed:
            length = self._depth.read(self._held)
            if length:
                parts.append(CallArguments(self._calls - 1, self._held[:length]))
                self._held = self._held[length:]
            if not self._depth.closed:
                return False
        tail = self._tools.tail
        if len(self._held) < len(tail) and tail.startswith(self._held):
            return False
        rest = self._held.removeprefix(tail)
        if self._tools.listed and len(rest) < len(LIST_BETWEEN) and LIST_BETWEEN.startswith(rest):
            return False
        if self._tools.listed and rest.startswith(LIST_BETWEEN):
            self._held = rest.removeprefix(LIST_BETWEEN)
            self._state, self._skipped = "head", ""
            return True
        self._held = rest.removeprefix(LIST_END) if self._tools.listed else rest
        self._state = "gap"
        return True


class _JSONDepth:
    """Finds where a JSON object ends: brackets counted, strings skipped."""

    def __init__(self) -> None:
        self._open = 0
        self._in_string = self._escaped = False
        self.closed = False

    def read(self, text: str) -> int:
        """How many characters of `text` belong to the object; sets `closed` at its end."""
        for at, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._open += 1
            elif letter in "}]":
                self._open -= 1
                if not self._open:
                    self.closed = True
                    return at + 1
        return len(text)
