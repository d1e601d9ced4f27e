"""`lichen fingerprint` as a person types it, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from lichen.cli.fingerprint import digest_of, layout_names
from lichen.errors import ConfigError
from tests.cli.test_commands import LICHEN, lichen
from tests.models.tiny_models import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers."""
    return write_tiny(tmp_path_factory.mktemp("fingerprint") / "tiny.gguf", "llama", tied=False)


def test_measured_once_and_known_then(tiny: Path, tmp_path: Path) -> None:
    words = ("fingerprint", str(tiny), "--layouts", "source,q8_0", "--seconds", "0")
    done = lichen(*words, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "measuring source…" in done.stderr
    one, other = json.loads(done.stdout)
    assert (one["layout"], other["layout"]) == ("source", "q8_0")
    assert one["model"] == other["model"] == digest_of(tiny)
    assert all(curve["output_row"] >= 0 for curve in one["threads"])
    assert one["kv"] == other["kv"]  # measured once for both
    files = sorted(path.read_bytes() for path in (tmp_path / "fingerprints").iterdir())
    assert len(files) == 2
    assert not list((tmp_path / "scratch").iterdir())

    table = lichen(*words, home=tmp_path).stdout
    assert table.split()[0] == "LAYOUT" and "q8_0" in table


def test_an_interruption_keeps_what_was_measured(tiny: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*LICHEN, "fingerprint", str(tiny), "--seconds", "600"],
        env={**os.environ, "LICHEN_HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        lines = iter(running.stderr.readline, "")
        assert any(line.startswith("measuring source") for line in lines)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 130
        assert "Traceback" not in running.stderr.read()
    assert len(list((tmp_path / "fingerprints").iterdir())) == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_names_of_layouts() -> None:
    assert layout_names(" source, Q8_0,source") == ["source", "q8_0"]
    for text in ("q9", "", "source,,f16"):
        with pytest.raises(ConfigError, match="no type that a model can be stored as"):
            layout_names(text)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_text("GGUF?")
    done = lichen("fingerprint", str(tmp_path / "bad.gguf"), home=tmp_path)
    assert done.returncode == 1
    assert "bad.gguf is not a GGUF" in done.stderr
