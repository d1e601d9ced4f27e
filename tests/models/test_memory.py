"""What loading costs, and that processes share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# VmHWM and not ru_maxrss, which begins with the size of the process that started this one.
LOAD = """
import json, sys
from pathlib import Path
import torch
def memory(field):
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index(field + ":") + 1])
bare = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
from lichen.models.load import load_model
model = load_model(Path(sys.argv[1]))
def read_all():
    return sum(int(tensor.data.max()) for tensor in model.file.tensors.values())
read_all()
print(json.dumps({"more": memory("VmHWM") - bare}), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
def test_loading_takes_the_file_and_little_more(model_path: Path) -> None:
    with _loaded(model_path) as process:
        more = _line(process)["more"]
        process.communicate("\n")
    size = model_path.stat().st_size
    assert 0.95 * size < more <= size + 100e6


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/PID/smaps")
def test_two_processes_share_the_pages(model_path: Path) -> None:
    size = model_path.stat().st_size
    with _loaded(model_path) as one, _loaded(model_path) as other:
        for process in (one, other):
            _line(process)
        for process in (one, other):
            maps = _mapping(process.pid, model_path)
            assert maps["Rss"] > 0.95 * size / 1024
            assert maps["Private_Dirty"] == 0
            assert maps["Shared_Clean"] == maps["Rss"]
            assert maps["Pss"] <= 0.55 * maps["Rss"]  # each page counts half, or less if others map it too
        for process in (one, other):
            process.communicate("\n")


def test_importing_lichen_imports_no_torch() -> None:
    names = "lichen, lichen.api, lichen.runtime.served_model, lichen.quant.gguf, lichen.quant.ggml"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_models_changes_no_setting_of_torch() -> None:
    code = """
import torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.get_num_interop_threads())
torch.manual_seed(7)
before = settings()
import lichen.models.load, lichen.models.loss, lichen.models.export
assert settings() == before
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _loaded(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOAD, str(path)]
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )


def _line(process: subprocess.Popen[str]) -> dict[str, int]:
    assert process.stdout is not None
    found: dict[str, int] = json.loads(process.stdout.readline())
    return found


def _mapping(pid: int, path: Path) -> dict[str, int]:
    """The fields of the file's mapping in KiB, summed where the kernel split it."""
    fields: dict[str, int] = {}
    within = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            within = words[-1] == str(path.resolve())
        elif within and words[-1] == "kB":
            fields[words[0][:-1]] = fields.get(words[0][:-1], 0) + int(words[1])
    return fields
