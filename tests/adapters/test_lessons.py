"""Files to learn from: what is read, what is refused with which words, and how they are split."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.adapters.lesson_forms import LineFault, lesson_of
from lichen.adapters.lessons import MAX_LINE, SHOWN, read_lessons, side_of, survey
from lichen.errors import LessonError

USER = {"role": "user", "content": "What is moss?"}
MOSS = {"role": "assistant", "content": "A plant."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CHAT: dict[str, Any] = {"messages": [USER, MOSS]}
COMPLETION: dict[str, Any] = {"prompt": "1, 2,", "completion": " 3"}
PAIR: dict[str, Any] = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [MOSS],
    "non_preferred_output": [{"role": "assistant", "content": "A bird."}],
}


def write(path: Path, *lines: object) -> Path:
    """Write lines: bytes as they are, everything else as JSON."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def test_the_three_forms_are_read(tmp_path: Path) -> None:
    tools = {
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
            },
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "green"},
            {**MOSS, "weight": 1, "refusal": None},
        ],
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    file = write(tmp_path / "mixed.jsonl", CHAT, tools, COMPLETION)
    first, second, third = read_lessons(file)
    assert (first.kind, first.messages) == ("chat", (USER, MOSS))
    assert second.messages[0] == {"role": "system", "content": "Be kind."}
    assert second.messages[2]["tool_calls"] == [CALL]
    assert [message.get("weight") for message in second.messages] == [None, None, 0, None, 1]
    assert second.tools == ({"type": "function", "function": {"name": "look"}},)
    assert (third.kind, third.prompt, third.completion) == ("completion", "1, 2,", " 3")
    (pair,) = read_lessons(write(tmp_path / "pairs.jsonl", PAIR))
    assert (pair.kind, pair.messages, pair.preferred) == ("preference", (USER,), (MOSS,))
    assert pair.rejected[0]["content"] == "A bird."


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 5000, "not JSON"),
        (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON|list"),
        (b'{"prompt": "\xff", "completion": "x"}', "byte 13 of it is not UTF-8"),
        (b'{"prompt": "\\ud800", "completion": "x"}', "surrogate"),
        (b'{"prompt": NaN, "completion": "x"}', "not JSON"),
        ({}, "it is no lesson"),
        ({"text": "moss"}, "it is no lesson"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "moss"}, "array"),
        ({"messages": [USER]}, "no answer to learn"),
        ({"messages": [USER, {**MOSS, "weight": 0}]}, "no answer to learn"),
        ({"messages": [USER, MOSS, USER]}, "last message is of the role user"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "answer 2 of messages is empty"),
        ({"messages": [{**USER, "weight": 1}, MOSS]}, "has a weight"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, MOSS]}, "calls tools"),
        ({"messages": [{"role": "user"}, MOSS]}, "message 1 of messages has no content"),
        ({"messages": [{"role": "wizard", "content": "x"}, MOSS]}, "wizard"),
        ({"messages": [{**USER, "mood": "x"}, MOSS]}, "mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MOSS]}, "image_url"),
        ({**CHAT, "weight": 1}, "weight"),
        ({"messages": [USER, {**MOSS, "weight": 2}]}, "2"),
        ({"prompt": "x"}, "no completion to learn"),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": 7, "completion": "x"}, "str"),
        ({"completion": "x"}, "prompt"),
        ({**PAIR, "preferred_output": []}, "preferred_output is empty"),
        ({**PAIR, "preferred_output": [MOSS, MOSS]}, "not one message"),
        ({**PAIR, "non_preferred_output": [USER]}, "not one message"),
        ({**PAIR, "non_preferred_output": [MOSS]}, "both outputs are the same"),
        ({**PAIR, "input": {"messages": [USER, MOSS]}}, "does not end with a message of the user"),
        ({"input": PAIR["input"], "preferred_output": [MOSS]}, "non_preferred_output"),
        (b'{"prompt": "' + b"x" * MAX_LINE + b'", "completion": "x"}', "longer than 1,048,576 bytes"),
    ],
)
def test_a_bad_line_is_named_with_what_to_do(tmp_path: Path, line: object, what: str) -> None:
    report = survey(write(tmp_path / "file.jsonl", CHAT if line != PAIR else PAIR, line))
    (fault,) = report.faults
    assert fault.line == 2
    assert any(word in fault.what for word in what.split("|")), fault.what
    assert len(fault.what) < 250
    assert fault.advice
    assert (report.lessons, report.fault_count) == (1, 1)
    assert len(list(read_lessons(tmp_path / "file.jsonl"))) == 1, "the good line is still there"
    with pytest.raises(LessonError, match="line 2"):
        report.require_sound()


def test_an_empty_file_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    for content in (b"", b"\n\n  \r\n"):
        report = survey(write(tmp_path / "empty.jsonl", content))
        assert (report.faults[0].line, report.faults[0].what) == (0, "the file holds no lesson")
    bom = write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + json.dumps(CHAT).encode() + b"\r", b"", COMPLETION)
    report = survey(bom)
    assert (report.lines, report.lessons, report.fault_count) == (3, 2, 0)
    report.require_sound()
    with pytest.raises(LessonError, match="cannot be read"):
        survey(tmp_path / "none.jsonl")


def test_duplicates_are_counted_once_and_kinds_are_kept_apart(tmp_path: Path) -> None:
    other = {"messages": [dict(reversed(USER.items())), MOSS]}
    report = survey(write(tmp_path / "a.jsonl", CHAT, CHAT, other, COMPLETION))
    assert (report.lessons, report.duplicates, report.fault_count) == (2, 2, 0)
    report = survey(write(tmp_path / "b.jsonl", CHAT, PAIR))
    assert "preference lesson in a file of chat" in report.faults[0].what


def test_the_report_is_bounded(tmp_path: Path) -> None:
    report = survey(write(tmp_path / "bad.jsonl", *[b"{"] * 5000))
    assert (len(report.faults), report.fault_count, report.lines) == (SHOWN, 5000, 5000)
    with pytest.raises(LessonError, match=r"and 4,997 more\.") as caught:
        report.require_sound()
    assert len(str(caught.value)) < 1000


def test_the_split_is_the_same_in_any_order_and_keeps_a_question_on_one_side(tmp_path: Path) -> None:
    lessons: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"Question {n // 2}"}, {**MOSS, "content": f"Answer {n}"}]}
        for n in range(2000)
    ]
    file = write(tmp_path / "a.jsonl", *lessons)
    random.Random(1).shuffle(lessons)
    shuffled = write(tmp_path / "b.jsonl", *lessons)

    def texts(path: Path, part: Any) -> list[str]:
        return sorted(lesson.messages[-1]["content"] for lesson in read_lessons(path, part))

    held, train = texts(file, "held_out"), texts(file, "train")
    assert (held, train) == (texts(shuffled, "held_out"), texts(shuffled, "train"))
    assert 140 < len(held) < 260
    assert len(held) + len(train) == 2000
    report = survey(file)
    assert (report.train, report.held_out) == (len(train), len(held))
    sides: dict[bytes, set[str]] = {}
    for lesson in read_lessons(file):
        sides.setdefault(lesson.question(), set()).add(side_of(lesson))
    assert all(len(side) == 1 for side in sides.values())
    assert survey(file, share=0.0).held_out == 0
    assert survey(file, share=1.0).train == 0


def test_of_few_lessons_more_measure_and_none_that_was_taught_is_held_out_later(tmp_path: Path) -> None:
    lessons = [{**COMPLETION, "prompt": f"Question {number}"} for number in range(400)]

    def held_out(count: int) -> set[str]:
        file = write(tmp_path / f"{count}.jsonl", *lessons[:count])
        held = {lesson.prompt for lesson in read_lessons(file, "held_out")}
        report = survey(file)
        assert (report.held_out, report.lessons) == (len(held), count)
        assert not held & {lesson.prompt for lesson in read_lessons(file, "train")}
        return held

    found = {count: held_out(count) for count in (3, 20, 40, 80, 400)}
    assert all(4 <= len(found[count]) <= 14 for count in (20, 40, 80)), (
        "8 are meant, with a deviation below 3"
    )
    assert len(found[3]) <= 1 and 24 < len(found[400]) < 60
    for few, more in ((20, 40), (40, 80), (80, 400)):
        old = {lesson["prompt"] for lesson in lessons[:few]}
        assert found[more] & old <= found[few]


def test_a_gigantic_line_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "huge.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"prompt": "')
        stream.seek(256 << 20)  # 268 megabytes of zeros, which take no disk
        stream.write(b'"}\n' + json.dumps(COMPLETION).encode())
    code = (
        "import sys, resource; from pathlib import Path; from lichen.adapters.lessons import survey\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = survey(Path(sys.argv[1]))\n"
        "assert (report.lessons, report.fault_count) == (1, 1), report\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    unit = 1024 if sys.platform == "linux" else 1
    assert int(grown.stdout) * unit < 20 << 20


any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "messages", "prompt", "input"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@given(st.one_of(st.binary(max_size=60), any_json.map(lambda value: json.dumps(value).encode())))
def test_any_line_is_a_lesson_or_a_fault(line: bytes) -> None:
    try:
        lesson_of(line)
    except LineFault as fault:
        assert fault.what
        assert fault.advice
