"""`lichen adapters` from the command line, over the tiny model."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from lichen.adapters.journal import Journal
from lichen.adapters.records import Kept, Opinion
from lichen.adapters.registry import Registry
from lichen.adapters.versions import Note
from lichen.adapters.watch import Lived
from lichen.cli import app
from lichen.durable import SealedFile
from lichen.errors import LichenError, NotFound, RequestError
from lichen.runtime.lives import FILE, TITLE, Life
from tests.adapters.made_adapters import add_made, write_made
from tests.models.tiny_models import write_tiny

KEPT = Kept(
    owner="", response="r", choice=0, kind="text", request={"prompt": "x"}, answer={"text": "y"}, model="m"
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a model, and two versions of an adapter."""
    model = write_tiny(tmp_path / "tiny.gguf", "llama")
    registry = Registry(tmp_path / "adapters")
    for seed in (1, 2):
        add_made(registry, "mine", model, seed, blocks=range(2))
    return tmp_path


def run(home: Path, *arguments: str, input: str | None = None) -> str:
    """What the command prints. Raises what it raised."""
    done = CliRunner().invoke(app, ["--home", str(home), *arguments], input=input)
    if isinstance(done.exception, LichenError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def adapters(home: Path, *arguments: str) -> str:
    return run(home, "adapters", *arguments)


def test_an_empty_registry_says_where_adapters_come_from(tmp_path: Path) -> None:
    assert "no adapters yet" in adapters(tmp_path, "list")
    assert json.loads(adapters(tmp_path, "list", "--json")) == {}
    with pytest.raises(NotFound):
        adapters(tmp_path, "show", "mine")


def test_versions_are_promoted_shown_and_rolled_back(home: Path) -> None:
    registry = Registry(home / "adapters")
    first, second = registry.versions("mine")
    registry.note("mine", second.digest, Note(kind="gate", values={"verdict": "better", "loss": 1.25}))
    assert f"mine serves {second.digest[:12]}" in adapters(home, "promote", "mine")
    shown = adapters(home, "show", "mine")
    assert first.digest[:12] in shown and "serves" in shown and "gate: verdict better, loss 1.25" in shown
    whole: dict[str, Any] = json.loads(adapters(home, "show", "mine", "--json"))
    assert whole["standing"]["history"][-1] == second.digest
    assert second.digest[:12] in adapters(home, "list")
    assert "the model alone" in adapters(home, "rollback", "mine")
    adapters(home, "promote", "mine", first.digest[:8])
    assert registry.active("mine") == first


def test_the_lives_of_versions_are_shown_and_why_one_went_back(home: Path) -> None:
    registry = Registry(home / "adapters")
    first, second = (version.digest for version in registry.versions("mine"))
    for digest in (first, second):
        registry.promote("mine", digest)
    registry.rollback("mine", reason="Answers are rated down more often.", facts={"by": "probation"})
    lived = Lived(answers=4, loss=5.0, squares=7.0, drafted=10, accepted=6)
    lives = {first: Life(answers=1204, tokens=9000, until=1.7e9, lived=lived), "": Life(answers=2, tokens=3)}
    SealedFile(home / "adapters" / "mine" / FILE, TITLE).save(msgspec.json.encode(lives))
    with closing(Journal.open(home / "learning" / "journal.db")) as journal, journal.writing():
        for number, digest in enumerate((second, second, first)):
            about = {"adapter": "mine", "adapter_sha256": digest, "response": str(number)}
            journal.keep(msgspec.structs.replace(KEPT, **about))
            journal.rate("", str(number), 0, Opinion(rating="up" if digest == first else "down"))
    shown = adapters(home, "show", "mine")
    assert "1,204 answers, 9,000 tokens, loss 1.250, 60% of drafts right, 1 liked, 0 disliked" in shown
    assert f"{second[:12]}  lived: 0 answers, 0 tokens, 0 liked, 2 disliked" in shown
    assert "the model alone  lived" in shown
    assert "rolled back: reason Answers are rated down more often., by probation" in shown
    whole = json.loads(adapters(home, "show", "mine", "--json"))["lives"]
    assert whole[first]["lived"]["up"] == 1 and whole[second]["lived"]["down"] == 2


def test_two_versions_are_compared(home: Path) -> None:
    first, second = Registry(home / "adapters").versions("mine")
    shown = adapters(home, "diff", "mine", first.digest[:8], second.digest[:8])
    assert "0 added, 0 removed" in shown and "blk.1.ffn_down" in shown
    layers = json.loads(adapters(home, "diff", "mine", first.digest, second.digest, "--json"))["layers"]
    assert len(layers) == 14 and all(layer["distance"] > 0 for layer in layers)


def test_out_as_gguf_and_peft_and_in_again(home: Path) -> None:
    registry = Registry(home / "adapters")
    digest = registry.versions("mine")[0].digest
    adapters(home, "export", "mine", str(home / "out.gguf"), "--version", digest)
    adapters(home, "export", "mine", str(home / "out"), "--version", digest, "--peft")
    model = ("--model", str(home / "tiny.gguf"))
    assert digest[:12] in adapters(home, "import", "copy", str(home / "out.gguf"), *model)
    adapters(home, "import", "copy", str(home / "out"), *model)
    assert len(registry.versions("copy")) == 2
    with pytest.raises(LichenError, match="cannot be written"):
        adapters(home, "export", "mine", str(home / "out"), "--version", digest, "--peft")
    write_made(home / "bad.gguf", home / "tiny.gguf", 3, general_architecture="qwen2")
    with pytest.raises(LichenError, match="models of the kind"):
        adapters(home, "import", "copy", str(home / "bad.gguf"), *model)


def test_removing_asks_for_one_or_all(home: Path) -> None:
    registry = Registry(home / "adapters")
    first, second = registry.versions("mine")
    with pytest.raises(RequestError, match="--all"):
        adapters(home, "remove", "mine")
    adapters(home, "remove", "mine", "--version", first.digest[:8])
    assert registry.versions("mine") == [second]
    adapters(home, "remove", "mine", "--all")
    assert registry.names() == []


def test_what_was_forgotten_taints_what_learned_from_it(home: Path) -> None:
    registry = Registry(home / "adapters")
    version = registry.versions("mine")[0]
    with closing(Journal.open(home / "learning" / "journal.db")) as journal, journal.writing():
        record = journal.keep(KEPT)
        journal.used_in([record], version.digest)
    run(home, "feedback", "forget", record)
    assert version.digest in registry.standing("mine").tainted
    assert "tainted" in adapters(home, "show", "mine")
    with pytest.raises(LichenError, match="forgotten"):
        adapters(home, "promote", "mine", version.digest)
    adapters(home, "promote", "mine", version.digest, "--tainted")
    assert "tainted" in adapters(home, "list")
