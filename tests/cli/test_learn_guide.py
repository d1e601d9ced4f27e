"""docs/guides/learn.md as a stranger goes through it: its files, Python and commands, in its order."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from lichen.adapters.lessons import survey
from tests.conftest import MODEL, ROOT, RunningDaemon, free_port, wait_ready

GUIDE = (ROOT / "docs" / "guides" / "learn.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    for line in block.splitlines()
    if language == "sh" and re.match(r"([A-Z_]+=\S+ )*lichen ", line)
]
((_, PROGRAM),) = (block for block in BLOCKS if block[0] == "python")
((_, EXAM),) = (block for block in BLOCKS if block[0] == "json")
ASKED = next(line for line in COMMANDS if line.startswith(f"lichen run {MODEL}:"))
ANSWER = "Ingrid"


@dataclass
class Stranger:
    """Someone with a home, a folder to work in, and a daemon. said: by command, the last time."""

    folder: Path
    environment: dict[str, str]
    url: str
    said: dict[str, str] = field(default_factory=dict)

    def type(self, line: str) -> str:
        """A command of the guide, perhaps with a variable before it; what it says on both outputs."""
        words = shlex.split(line)
        at = words.index("lichen")
        variables = dict(word.split("=", 1) for word in words[:at])
        return self._run([sys.executable, "-m", "lichen.cli", *words[at + 1 :]], line, variables)

    def run(self, program: str) -> str:
        """A program of the guide, against this daemon."""
        program = program.replace("http://127.0.0.1:8642", self.url)
        return self._run([sys.executable, "-c", program], "python", {})

    def _run(self, command: list[str], name: str, variables: dict[str, str]) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3000,
            check=False,
        )
        assert done.returncode == 0, f"{name}\n{done.stdout}{done.stderr}"
        self.said[name] = done.stdout + done.stderr
        return self.said[name]


@pytest.fixture
def stranger(lichen_home: Path, tmp_path: Path) -> Iterator[Stranger]:
    """With the guide's first command running: `lichen serve`, at a port that is free."""
    assert COMMANDS[0] == "lichen serve"
    home, folder, port = tmp_path / "home", tmp_path / "work", free_port()
    folder.mkdir()
    home.mkdir()
    (home / "store").symlink_to(lichen_home / "store")  # so that the model is not fetched again
    environment = {**os.environ, "LICHEN_HOME": str(home), "LICHEN_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lichen.cli", "serve"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(RunningDaemon(process, f"{url}/v1", url, MODEL), 120)
        yield Stranger(folder, environment, url)
    finally:
        process.kill()
        process.communicate()


def test_the_exam_asks_what_was_corrected_and_nothing_that_is_learned(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text(EXAM)
    report = survey(tmp_path / "exam.jsonl")
    assert (report.lessons, report.fault_count) == (6, 0)
    exam = [json.loads(line)["messages"] for line in EXAM.splitlines()]
    corrections = dict(re.findall(r'^    "(.+)": "(.+)",$', PROGRAM, re.MULTILINE))
    assert {right["content"] for _, right in exam} == set(corrections.values())
    assert not {question["content"] for question, _ in exam} & set(corrections)


def test_three_corrections_are_durable_and_become_lessons(stranger: Stranger) -> None:
    """All of the guide that comes before the training."""
    said = stranger.run(PROGRAM)
    assert len(said.splitlines()) >= 3 and ANSWER not in said, "the model does not know it"
    assert stranger.type("lichen feedback list").count("down") == 3
    stranger.type("lichen feedback export -o corrections.jsonl")
    report = survey(stranger.folder / "corrections.jsonl")
    assert (report.lessons, report.fault_count) == (3, 0)


@pytest.mark.slow  # answers a hundred general questions first: minutes
@pytest.mark.timeout(3600)
def test_the_guide_runs(stranger: Stranger) -> None:
    (stranger.folder / "exam.jsonl").write_text(EXAM)
    stranger.run(PROGRAM)
    assert len(COMMANDS) == 9
    said = [stranger.type(line) for line in COMMANDS[1:]]
    learned = next(line for line in COMMANDS if " lichen learn " in line)
    assert f"It serves now as {MODEL}:house." in stranger.said[learned]
    assert "loss on the lesson" in stranger.said["lichen adapters show house"]
    assert ANSWER in said[COMMANDS.index(ASKED) - 1]
    plain = stranger.said[ASKED.replace(":house", "")]
    assert ANSWER not in plain
    assert "the model alone" in stranger.said["lichen adapters rollback house"]
    assert stranger.said[ASKED] == plain, "the last time it was asked nothing was left of the adapter"
    metrics = httpx.get(f"{stranger.url}/metrics").text
    assert f'lichen_adapter_requests_total{{model_name="{MODEL}",adapter="house"}} 2' in metrics
