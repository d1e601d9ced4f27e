"""`lichen learn` from the command line to the adapter's folder, over the tiny model's real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lichen.cli import app
from tests.models.tiny_models import write_tiny


def learn(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    environment = {**os.environ, "LICHEN_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lichen.cli", "learn", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def lessons(tmp_path: Path) -> Path:
    """Questions and answers for the tiny model."""
    path = tmp_path / "lessons.jsonl"
    lines = [json.dumps({"prompt": f"Q{number}", "completion": "yes"}) for number in range(30)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_it_trains_and_says_what_changed(lessons: Path, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", "llama")
    done = learn(tmp_path, str(lessons), "--name", "yes", "--model", str(model), "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "lessons to learn" in done.stderr and "held-out loss" in done.stdout
    folder = Path(done.stdout.split()[-1])
    assert folder.parent == tmp_path / "adapters" / "yes"
    assert {path.name for path in folder.iterdir()} == {"adapter.gguf", "notes.json", "version.json"}
    version = json.loads((folder / "version.json").read_bytes())
    assert version["digest"] == folder.name and version["lineage"]["scores"]["after"]["loss"] > 0
    assert "serve" in done.stderr  # it does now, or it does not and why
    assert "held-out loss" in done.stderr and "after half" in done.stderr  # of the two, one is kept
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 31: it is not JSON"), ('{"prompt": "x"}', "line 31: it has a prompt but no completion")],
)
def test_bad_lines_are_listed_before_anything_is_loaded(
    line: str, words: str, lessons: Path, tmp_path: Path
) -> None:
    with lessons.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = learn(tmp_path, str(lessons), "--name", "x", "--model", str(tmp_path / "none.gguf"))
    assert done.returncode == 1
    assert words in done.stderr and "1 of 31 lines cannot be learned from" in done.stderr


def test_a_file_that_only_measures_leaves_all_others_to_learn(lessons: Path, tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    given = ["--name", "x", "--model", str(tmp_path / "none.gguf"), "--validation", str(exam)]

    def said(content: str) -> str:
        exam.write_text(content, encoding="utf-8", errors="surrogateescape")
        done = CliRunner().invoke(app, ["--home", str(tmp_path), "learn", str(lessons), *given])
        assert done.exit_code == 1
        return f"{done.output}{done.exception}"

    assert "30 lessons to learn, 1 to measure with." in said('{"prompt": "Why?", "completion": "yes"}')
    pair: dict[str, object] = {"input": {"messages": [{"role": "user", "content": "Why?"}]}}
    for which in ("preferred_output", "non_preferred_output"):
        pair[which] = [{"role": "assistant", "content": which}]
    for content, words in (
        ("{", "line 1: it is not JSON"),
        (json.dumps(pair), "exam.jsonl of preference"),
        ("", "the file holds no lesson"),
        ("\udcff", "not UTF-8"),
    ):
        assert words in said(content)


def test_a_name_that_would_leave_the_folder_is_refused(lessons: Path, tmp_path: Path) -> None:
    done = learn(tmp_path, str(lessons), "--name", "../x")
    assert done.returncode == 1 and "cannot be a name" in done.stderr
