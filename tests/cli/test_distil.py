"""`lichen distil` reads prompts; what it does with a model is shown by `slow` tests and the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from lichen.cli.distil import LONGEST, read_prompts, sparkline
from lichen.errors import LessonError


def prompts(tmp_path: Path, text: str) -> list[list[dict[str, str]]]:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def test_lines_of_text_and_of_json_are_prompts(tmp_path: Path) -> None:
    found = prompts(
        tmp_path,
        'What is two?\n\n{"prompt": "And three?"}\n'
        '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},'
        ' {"role": "assistant", "content": "Hello!"}]}\n',
    )
    assert [messages[-1]["content"] for messages in found] == ["What is two?", "And three?", "Hi"]
    assert [message["role"] for message in found[2]] == ["system", "user"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        '{"prompt": 3}',
        '{"prompt": " "}',
        '{"messages": "x"}',
        '{"messages": []}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": [3]}',
        '{"messages": [{"role": "user", "content": ["x"]}]}',
        '{"messages": ' + "[" * 50_000,
        "x" * (LONGEST + 1),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(LessonError, match=r"Line 2 of prompts\.txt"):
        prompts(tmp_path, f"fine\n{line}\n")


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LessonError, match="no prompts"):
        prompts(tmp_path, "\n\n")
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(LessonError, match="cannot be read"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(LessonError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


def test_losses_become_a_line() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 1.0]) == "█▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(at) for at in range(1000)])) == 40
