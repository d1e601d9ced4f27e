"""The preflight names what is missing, and the package that brings it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import ModuleType

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "preflight.py"


@pytest.fixture
def preflight() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*flags: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env=environment, capture_output=True, text=True, check=False
    )


def test_a_machine_without_a_compiler_is_told_the_package_and_the_way_around() -> None:
    done = run(path="/nowhere")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "compiler" in done.stderr
    assert "LICHEN_PREBUILT=1" in done.stderr
    assert run("--prebuilt", path="/nowhere").returncode == 0


def test_this_machine_is_fine() -> None:
    assert run(path=os.environ["PATH"]).returncode == 0


def test_an_old_python_and_a_full_disk_are_said(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, 10**8))
    assert "0.1 GB are free" in preflight.missing(prebuilt=True)
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    assert "this is 3.9" in preflight.missing(prebuilt=True)
