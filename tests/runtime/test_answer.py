"""An answer's text into its parts: any cut gives the same parts, and nothing of a marker leaks."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.runtime.answer import AnswerReader, CallArguments, CallBegins, Part, Said, Thinking, Thought
from lichen.runtime.tools import ToolFormat, formats

HERMES, LLAMA = formats()["hermes"], formats()["llama3"]


def read(text: str, cuts: list[int], tools: ToolFormat | None, thinking: Thinking) -> tuple[str, str, list[tuple[str, str]]]:
    """What is said, thought and called, when the text comes in pieces."""
    reader = AnswerReader(tools=tools, thinking=thinking)
    parts: list[Part] = []
    start = 0
    for cut in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        parts += reader.feed(text[start:cut])
        start = cut
    parts += reader.flush()
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallBegins):
            assert part.index == len(calls)
            calls.append((part.name, ""))
        elif isinstance(part, CallArguments):
            calls[part.index] = (calls[part.index][0], calls[part.index][1] + part.text)
    said = "".join(part.text for part in parts if isinstance(part, Said))
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    assert reader.calls == len(calls)
    return said, thought, calls


NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
ARGUMENTS = st.dictionaries(st.text(max_size=6), st.text(max_size=20) | st.integers() | st.lists(st.none()))


@given(
    st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3),
    st.lists(st.integers(0, 500), max_size=12),
    st.sampled_from([HERMES, LLAMA]),
)
def test_calls_come_out_as_they_went_in_wherever_the_text_is_cut(
    calls: list[tuple[str, dict[str, object]]], cuts: list[int], form: ToolFormat
) -> None:
    text = "Let me see." + "".join(form.written(name, json.dumps(arguments)) for name, arguments in calls)
    said, thought, found = read(text, cuts, form, None)
    assert (said, thought) == ("Let me see.", "")
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(st.lists(st.integers(0, 60), max_size=8))
def test_thinking_is_kept_apart_wherever_the_text_is_cut(cuts: list[int]) -> None:
    assert read("<think>a < b\n</think>\n\nYes.", cuts, None, "maybe") == ("Yes.", "a < b\n", [])
    assert read("a < b</think> Yes.", cuts, None, "open") == ("Yes.", "a < b", [])
    assert read("Yes, <think> is a word.", cuts, None, "maybe") == ("Yes, <think> is a word.", "", [])


@given(st.lists(st.integers(0, 60), max_size=8))
def test_a_call_after_thinking(cuts: list[int]) -> None:
    text = "<think>I need it.</think>\n" + HERMES.written("get", '{"a": "}"}')
    assert read(text, cuts, HERMES, "maybe") == ("", "I need it.", [("get", '{"a": "}"}')])


@pytest.mark.parametrize("text", ["<tool_call>", "<tool_call>never", '<tool_call>\n{"nam', "<tool_", "< tool_call>"])
def test_what_only_looks_like_a_call_stays_text(text: str) -> None:
    said, _, calls = read(text, [3, 9], HERMES, None)
    assert (said, calls) == (text, [])


@given(st.text(max_size=80), st.lists(st.integers(0, 80), max_size=8), st.sampled_from([HERMES, None]))
def test_any_text_survives(text: str, cuts: list[int], form: ToolFormat | None) -> None:
    said, thought, calls = read(text, cuts, form, None)
    assert calls or said == text
    assert not thought
