"""The commands of docs/guides/fleet.md, in its order, as a publisher and two devices type them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.sync.download import hash_file
from tests.adapters.made_adapters import write_made
from tests.cli.test_commands import lichen
from tests.conftest import ROOT

GUIDE = (ROOT / "docs" / "guides" / "fleet.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("lichen ")
]
HEALTH = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)[0]


@pytest.fixture
def places(tmp_path: Path, model_path: Path) -> Iterator[dict[str, str]]:
    """What the guide's names are in this test."""
    (tmp_path / "health.json").write_text(HEALTH)
    write_made(tmp_path / "tone-1.gguf", model_path, 1)
    yield {
        "https://models.example": (tmp_path / "fleet").as_uri(),
        "/srv/fleet": str(tmp_path / "fleet"),
        "support-1.gguf": str(model_path),
        "tone-1.gguf": str(tmp_path / "tone-1.gguf"),
        "health.json": str(tmp_path / "health.json"),
        "enrolment.json": str(tmp_path / "fleet" / "enrolment.json"),
        "SHA256": hash_file(model_path),
        "/media/stick": str(tmp_path / "stick"),
    }
    shutil.rmtree(tmp_path / "fleet", ignore_errors=True)  # a hundred megabytes


def test_the_guide_runs(places: dict[str, str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    said: dict[str, str] = {}

    def run(line: str, home: Path) -> subprocess.CompletedProcess[str]:
        words = [places.get(word, word) for word in shlex.split(line)[1:]]
        if words[0] == "run":
            words += ["--max-tokens", "8"]  # that it answers is enough
        done = lichen(*words, home=home, LICHEN_FLEET_PASSPHRASE="correct horse", LICHEN_THREADS="1")
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        said[line] = done.stdout
        return done

    assert len(COMMANDS) == 12
    for line in COMMANDS:
        if line.startswith("lichen import"):
            run("lichen fleet enrol enrolment.json", second)
            shutil.rmtree(tmp_path / "fleet" / "metadata")  # no network: its mirror is gone
        run(line, second if line.startswith("lichen import") else first)
    assert said['lichen run fleet:support "Why is the sky blue?"'].strip()
    shown = said["lichen fleet state"].splitlines()
    assert any(line.split()[:2] == ["models/support", "support-1"] for line in shown), shown
    adapters = json.loads(run("lichen adapters list --json", first).stdout)
    assert adapters["tone"][0]["history"][-1] == adapters["tone"][1][0]["digest"], "it serves"
    state = json.loads(run("lichen fleet state --json", first).stdout)
    assert {row["name"]: row["state"] for row in state["updates"]} == {
        "adapters/tone": "confirmed",
        "models/support": "confirmed",
    }
    state = json.loads(run("lichen fleet state --json", second).stdout)
    assert {row["name"]: row["state"] for row in state["updates"]}["models/support"] == "confirmed"
