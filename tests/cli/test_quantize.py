"""`lichen quantize` and `lichen eval` as a person types them, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from lichen.cli import app
from lichen.cli.quantize import size_of
from lichen.errors import ConfigError, LichenError, RequestError
from lichen.quant.gguf import open_gguf
from tests.cli.test_commands import LICHEN, lichen
from tests.models.tiny_models import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and what is no text."""
    folder = tmp_path_factory.mktemp("quantize")
    write_tiny(folder / "tiny.gguf", "llama", tied=True)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (folder / "picture.txt").write_bytes(bytes(range(256)))
    (folder / "broken.gguf").write_bytes((folder / "tiny.gguf").read_bytes()[:-500])
    return folder


def test_under_a_budget_then_scored_by_both(folder: Path, tmp_path: Path) -> None:
    target, text = tmp_path / "small.gguf", folder / "text.txt"
    done = lichen(
        *("quantize", str(folder / "tiny.gguf"), str(target), "--size", "100KB", "--json"),
        *("--calibration", str(text), "--tokens", "1024", "--measure-tokens", "256"),
        *("--types", "q4_0,q5_0,q8_0", "--save-importance", str(tmp_path / "importance.gguf")),
        *("--picture", str(tmp_path / "bits.svg")),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == target.stat().st_size <= 100_000
    assert set(report["weights_by_type"]) <= {"Q4_0", "Q5_0", "Q8_0"}
    assert report["kl_measured"] > 0
    assert (tmp_path / "importance.gguf").is_file()
    assert (tmp_path / "bits.svg").read_text().lstrip().startswith("<?xml")
    assert [stage.split("…")[0] for stage in done.stderr.split("\n")[:2]] == ["importance", "reference"]
    with open_gguf(target) as file:
        assert file.metadata["lichen.source.file"].content == "tiny.gguf"
        assert {name: one.type.name for name, one in file.tensors.items()} == report["types"]

    done = lichen(
        *("eval", str(target), "--text", str(text), "--tokens", "512", "--window", "128", "--json"),
        *("--reference", str(folder / "tiny.gguf")),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    engine, torch = scores["engine"], scores["torch"]
    assert engine["positions"] == torch["positions"] == 4 * 127
    assert engine["perplexity"] == pytest.approx(torch["perplexity"], rel=0.05)
    assert engine["kl"] == pytest.approx(torch["kl"], rel=0.2)


def test_one_type_says_what_did_not_fit(folder: Path, tmp_path: Path) -> None:
    done = lichen(
        "quantize", str(folder / "tiny.gguf"), str(tmp_path / "made.gguf"), "--type", "q4_k", home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "15 tensors have rows that are no multiple of Q4_K's block and became IQ4_NL" in " ".join(
        done.stdout.split()
    )
    assert "layer 1" in done.stdout


def test_a_family_that_torch_cannot_run_is_quantized_without_measuring(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "other.gguf", "llama", keys={"strange_key": 3})
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 100)
    done = lichen(
        *("quantize", str(source), str(tmp_path / "made.gguf"), "--size", "150KB"),
        *("--calibration", str(tmp_path / "text.txt")),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Quantized without measuring" in done.stdout
    assert (tmp_path / "made.gguf").stat().st_size <= 150_000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("tiny.gguf", "--type", "q9"), "'q9' is no type that a model can be stored as"),
        (("tiny.gguf",), "exactly one of --type, --size and --bits"),
        (("tiny.gguf", "--type", "q8_0", "--bits", "4"), "exactly one of --type, --size and --bits"),
        (("tiny.gguf", "--bits", "4"), "A budget needs a text"),
        (("tiny.gguf", "--bits", "-1", "--calibration", "text.txt"), "--bits is -1"),
        (("tiny.gguf", "--size", "9MM", "--calibration", "text.txt"), "not a size such as 90MB"),
        (("tiny.gguf", "--size", "9KB", "--calibration", "text.txt"), "the smallest possible"),
        (("tiny.gguf", "--type", "q8_0", "--calibration", "picture.txt"), "is not a text in UTF-8"),
        (("tiny.gguf", "--type", "q8_0", "--calibration", "nothing.txt"), "cannot be read"),
        (("tiny.gguf", "--type", "q8_0", "--importance", "text.txt"), "does not begin with GGUF"),
        (("nothing.gguf", "--type", "q8_0"), "There is no file"),
        (("tiny.gguf", "--type", "q8_0", "--save-importance", "text.txt"), "no importance matrix to save"),
        (("nothing", "--type", "q8_0"), "The model 'nothing' is not here"),
        (("broken.gguf", "--type", "q8_0"), "it is cut off"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(
    folder: Path, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    source, *options = (str(folder / word) if "." in word and "-" not in word else word for word in words)
    with pytest.raises(LichenError) as caught:
        command("quantize", source, str(tmp_path / "made.gguf"), *options, home=tmp_path / "home")
    assert sentence in str(caught.value)
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def command(*words: str, home: Path) -> None:
    """The command in this process; `lichen.cli.main` makes a sentence and an exit code of what it raises."""
    app(["--home", str(home), *words], standalone_mode=False, prog_name="lichen")


@pytest.mark.slow
def test_the_default_model_scored_by_both(model_path: Path, tmp_path: Path) -> None:
    """Real text: both agree on the perplexity, and torch sees the weights of the file without any noise."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    done = lichen(
        *("eval", str(model_path), "--text", str(tmp_path / "text.txt")),
        *("--tokens", "512", "--window", "256"),
        *("--reference", str(model_path), "--json"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    engine, torch = scores["engine"], scores["torch"]
    assert engine["positions"] == torch["positions"] == 2 * 255
    assert engine["perplexity"] == pytest.approx(torch["perplexity"], rel=0.02)
    assert 1 < torch["perplexity"] < 40
    for scored in (engine, torch):
        assert abs(scored["kl"]) < 1e-6 and scored["same_top"] == 1


def test_eval_refuses_short_texts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Hello.")
    words = ("eval", str(folder / "tiny.gguf"), "--text")
    with pytest.raises(RequestError, match="fewer than one stretch of 512"):
        command(*words, str(tmp_path / "short.txt"), home=tmp_path / "home")


def test_an_interruption_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [
            *(*LICHEN, "quantize", str(folder / "tiny.gguf"), str(tmp_path / "made.gguf"), "--size", "100KB"),
            *("--calibration", str(folder / "text.txt"), "--tokens", "1024"),
        ],
        env={**os.environ, "LICHEN_HOME": str(tmp_path / "home")},
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("importance")
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 130
        assert "Traceback" not in running.stderr.read()
    assert not list(tmp_path.glob("made*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("90MB", 90_000_000), ("1.5 GiB", 3 << 29), ("123", 123), ("5kb", 5000), ("2MiB", 2 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "nan", "inf", "1e400", "3 parsecs", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        size_of(text)
