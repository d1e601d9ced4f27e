"""An answer's text into its parts: any cut gives the same parts, and nothing of a marker leaks."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.runtime.answer import AnswerReader, CallArguments, CallBegins, Part, Said, Thinking, Thought
from lichen.runtime.tools import ToolFormat, formats

HERMES, LLAMA = formats()["hermes"], formats()["llama3"]
MISTRAL, MISTRAL_ARGS = formats()["mistral"], formats()["mistral_args"]


def read(
    text: str,
    cuts: list[int],
    tools: ToolFormat | None,
    thinking: Thinking,
    *,
    cut: bool = False,
    names: tuple[str, ...] = (),
    only_calls: bool = False,
) -> tuple[str, str, list[tuple[str, str]]]:
    """What is said, thought and called, when the text comes in pieces."""
    reader = AnswerReader(tools=tools, thinking=thinking, names=names, only_calls=only_calls)
    parts: list[Part] = []
    start = 0
    for end in [*sorted(at % (len(text) + 1) for at in cuts), len(text)]:
        parts += reader.feed(text[start:end])
        start = end
    parts += reader.flush(cut=cut)
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
    st.sampled_from([HERMES, LLAMA, MISTRAL, MISTRAL_ARGS]),
)
def test_calls_come_out_as_they_went_in_wherever_the_text_is_cut(
    calls: list[tuple[str, dict[str, object]]], cuts: list[int], form: ToolFormat
) -> None:
    text = "Let me see." + "".join(form.written(name, json.dumps(arguments)) for name, arguments in calls)
    said, thought, found = read(text, cuts, form, None)
    assert (said, thought) == ("Let me see.", "")
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(
    st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3),
    st.lists(st.integers(0, 500), max_size=12),
    st.sampled_from(["[", " ["]),
)
def test_calls_of_one_list_come_out_as_they_went_in(
    calls: list[tuple[str, dict[str, object]]], cuts: list[int], opened: str
) -> None:
    items = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    said, _, found = read(f"Well.{MISTRAL.marker}{opened}{', '.join(items)}]", cuts, MISTRAL, None)
    assert said == "Well."
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("form", [MISTRAL, MISTRAL_ARGS])
def test_mistrals_templates_take_the_ids_back(form: ToolFormat) -> None:
    assert len(form.new_id()) == 9
    assert form.new_id().isalnum()


@given(st.lists(st.integers(0, 60), max_size=8))
def test_thinking_is_kept_apart_wherever_the_text_is_cut(cuts: list[int]) -> None:
    assert read("<think>a < b\n</think>\n\nYes.", cuts, None, "maybe") == ("Yes.", "a < b\n", [])
    assert read("a < b</think> Yes.", cuts, None, "open") == ("Yes.", "a < b", [])
    assert read("Yes, <think> is a word.", cuts, None, "maybe") == ("Yes, <think> is a word.", "", [])


@given(st.lists(st.integers(0, 60), max_size=8))
def test_a_call_after_thinking(cuts: list[int]) -> None:
    text = "<think>I need it.</think>\n" + HERMES.written("get", '{"a": "}"}')
    assert read(text, cuts, HERMES, "maybe") == ("", "I need it.", [("get", '{"a": "}"}')])


@pytest.mark.parametrize(
    "text", ["<tool_call>", "<tool_call>never", '<tool_call>\n{"nam', "<tool_", "< tool_call>"]
)
def test_what_only_looks_like_a_call_stays_text(text: str) -> None:
    said, _, calls = read(text, [3, 9], HERMES, None, names=("get",))
    assert (said, calls) == (text, [])


@given(
    st.data(),
    st.sampled_from([HERMES, LLAMA, MISTRAL, MISTRAL_ARGS]),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_a_call_cut_before_its_name_is_complete_is_dropped(
    data: st.DataObject, form: ToolFormat, cuts: list[int]
) -> None:
    head = form.written("weather", "").removesuffix(form.tail + "]" if form.listed else form.tail)
    begun = head[: data.draw(st.integers(len(form.marker), len(head) - 1))]
    before = "Let me see."
    assert read(before + begun, cuts, form, None, cut=True, names=("now", "weather"))[::2] == (before, [])
    first = form.written("now", "{}")
    assert read(first + begun, cuts, form, None, cut=True, names=("now", "weather"))[::2] == (
        "",
        [("now", "{}")],
    )


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("a <", HERMES),  # a comparison, for all one knows
        ("<tool_", HERMES),
        ('<tool_call>\n{"name": "x', HERMES),  # no tool is called so
        ("<tool_call> is a tag", HERMES),
        ('{"name": "Ada Lovelace", "born', LLAMA),  # an answer in JSON
        ("[TOOL_CALLS] are", MISTRAL),
        ('[TOOL_CALLS] [{"title', MISTRAL),
    ],
)
def test_what_only_looks_like_a_call_stays_text_when_the_answer_is_cut(text: str, form: ToolFormat) -> None:
    assert read(text, [3, 9], form, None, cut=True, names=("get", "now"))[::2] == (text, [])


@pytest.mark.parametrize("cut", [True, False], ids=["limit", "stop string"])
@pytest.mark.parametrize("length", range(1, len(HERMES.marker + HERMES.head("get"))))
def test_nothing_of_a_cut_call_is_said_where_only_calls_are_allowed(length: int, cut: bool) -> None:
    text = (HERMES.marker + HERMES.head("get"))[:length]
    assert read(text, [3], HERMES, None, cut=cut, names=("get",), only_calls=True) == ("", "", [])
    assert read(text, [3], HERMES, "maybe", cut=cut, names=("get",), only_calls=True) == ("", "", [])


@given(st.text(max_size=80), st.lists(st.integers(0, 80), max_size=8), st.sampled_from([HERMES, None]))
def test_any_text_survives(text: str, cuts: list[int], form: ToolFormat | None) -> None:
    said, thought, calls = read(text, cuts, form, None)
    assert calls or said == text
    assert not thought
