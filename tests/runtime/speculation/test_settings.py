"""From settings and requests to drafters, and back to numbers that a client sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lichen.adapters.draft_head import write_head
from lichen.api import draft_file, model_options
from lichen.config import load
from lichen.errors import ConfigError, LichenError, NotFound
from lichen.quant.gguf_check import check_gguf
from lichen.runtime.http.guard import owner
from lichen.runtime.http.log_format import EXCHANGE, Exchange
from lichen.runtime.memory import estimate
from lichen.runtime.sequence import LOCAL
from lichen.runtime.served_model import ModelOptions
from lichen.runtime.speculation.build import EXTRA_OUTPUTS, Choice, SpeculationOptions, build
from lichen.runtime.speculation.head import HeadDrafter
from lichen.runtime.speculation.heads import HeadStore, head_folder
from lichen.runtime.speculation.suffix import SuffixDrafter
from tests.quant.tiny_gguf import tiny_gguf
from tests.runtime.speculation.test_head import counting_head


def built(options: SpeculationOptions, *, cuttable: bool = True) -> list[Any]:
    model = Mock(cuttable=cuttable, vocab_size=100)
    context = Mock(batch=256, outputs=36, context=1024, hidden=8, wants_states=False)
    speculation = build(
        model, context, options, path=Path("/m"), sha256="ab" * 32, identity="model", threads=1
    )
    assert context.wants_states == bool(speculation.readers)
    speculation.close()
    return speculation.drafters


def test_each_setting_gives_its_drafters() -> None:
    assert built(SpeculationOptions()) == []
    for choice in ("suffix", "auto"):
        (drafter,) = built(SpeculationOptions(drafters=choice))
        assert isinstance(drafter, SuffixDrafter)


def test_a_head_drafts_where_there_may_be_one(tmp_path: Path) -> None:
    assert built(SpeculationOptions(drafters="head", home=tmp_path)) == []  # nor does it learn
    counts: dict[Choice, int] = {"head": 1, "auto": 2, "suffix": 1}
    for choice, count in counts.items():
        found = built(SpeculationOptions(drafters=choice, home=tmp_path, distil_limit=1000))
        assert len(found) == count and isinstance(found[-1], HeadDrafter) == (choice != "suffix")


def test_a_daemon_that_keeps_nothing_learns_nothing(tmp_path: Path) -> None:
    for journal, limit in (("off", 0), ("ask", 100_000_000)):
        config = load({"home": tmp_path, "journal": journal}, {}).config
        assert model_options(config).speculation.distil_limit == limit


def test_a_model_that_cannot_forget_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    assert built(SpeculationOptions(drafters="suffix"), cuttable=False) == []
    assert "cannot be cut" in caplog.text


def test_model_without_a_draft_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no draft model"):
        built(SpeculationOptions(drafters="model"))


def test_a_file_that_is_no_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    options = SpeculationOptions(drafters="model", draft_model=path)
    whole = tmp_path / "model.gguf"
    whole.write_bytes(tiny_gguf())
    with pytest.raises(LichenError):
        estimate(check_gguf(whole), ModelOptions(speculation=options))


def test_a_draft_model_counts_in_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf())
    summary, plain = check_gguf(path), ModelOptions(context=256, slots=1)
    alone = estimate(summary, plain).total
    options = SpeculationOptions(drafters="model", draft_model=path)
    both = ModelOptions(context=256, slots=1, speculation=options)
    assert estimate(summary, both).total >= 2 * alone
    assert both.outputs == 1 + EXTRA_OUTPUTS


def test_a_draft_model_is_found_and_never_fetched(tmp_path: Path) -> None:
    settings = {"home": tmp_path, "speculation": "auto", "draft_model": "nowhere-1b"}
    with pytest.raises(NotFound, match="nowhere-1b"):
        draft_file(load(settings, {}).config)
    assert draft_file(load(settings | {"speculation": "suffix"}, {}).config) is None
    path = tmp_path / "draft.gguf"
    path.write_bytes(tiny_gguf())
    options = model_options(load(settings | {"draft_model": str(path), "threads": 1}, {}).config)
    assert options.speculation.draft_model == path
    assert options.speculation.answers_folder == tmp_path / "answers"


@pytest.mark.parametrize("value", ["fast", "true", ""])
def test_a_word_that_is_none_of_the_choices_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="auto, off, suffix, model"):
        load({"speculation": value}, {})


def test_past_answers_belong_to_the_api_key() -> None:
    assert owner() == LOCAL
    token = EXCHANGE.set(Exchange("1"))
    try:
        assert owner() == LOCAL, "where no key is needed"
        EXCHANGE.set(Exchange("2", key="key_0123456789ab"))
        assert owner() == "key_0123456789ab"
    finally:
        EXCHANGE.reset(token)


def test_a_given_head_is_the_first_version_from_which_learning_goes_on(tmp_path: Path) -> None:
    write_head(tmp_path / "given.gguf", counting_head(vocabulary=100, hidden=8))
    options = SpeculationOptions(drafters="head", home=tmp_path, draft_head=tmp_path / "given.gguf")
    (drafter,) = built(options)
    assert isinstance(drafter, HeadDrafter) and drafter.head is not None
    folder = head_folder(tmp_path, "ab" * 32)
    assert HeadStore(folder, base="ab" * 32, vocabulary=100, hidden=8).version == 1
