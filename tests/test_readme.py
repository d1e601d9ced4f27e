"""The README's examples run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MODEL, ROOT, RunningDaemon

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python (\w+)\n(.*?)```", re.DOTALL)
EXAMPLES = {kind: code for kind, code in BLOCK.findall(README)}


def run(code: str, home: Path) -> str:
    environment = {**os.environ, "LICHEN_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_http_example(daemon: RunningDaemon, lichen_home: Path) -> None:
    assert "http://127.0.0.1:8642/v1" in EXAMPLES["http"]
    assert "sky" in run(EXAMPLES["http"].replace("http://127.0.0.1:8642/v1", daemon.base_url), lichen_home)


def test_the_embedded_example(lichen_home: Path, model_path: Path) -> None:
    if lichen_home not in model_path.parents:
        pytest.skip(f"LICHEN_TEST_MODEL is set, so {MODEL} is not in the tests' store")
    assert "rainbow" in run(EXAMPLES["embedded"], lichen_home)  # greedy: the same answer every time


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
