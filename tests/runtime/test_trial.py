"""A version of each kind on trial in the engine: models, adapters over their model, draft heads beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lichen.errors import AdapterError, ModelFileError
from lichen.runtime.trial import EngineTrial
from lichen.sync.download import hash_file
from lichen.sync.updates.health import Installed, Prompt
from tests.adapters.made_adapters import write_made

PROMPTS = (Prompt(text="Count to five.", max_tokens=8),)
TEXT = "The ferry crosses the river at noon, and the bells of the town are heard on the water. " * 4


@pytest.fixture(scope="module")
def trial() -> EngineTrial:
    return EngineTrial(threads=2)


def version(slot: str, path: Path, base: Path | None = None) -> Installed:
    """As the updater gives it to the trial."""
    of_base = "" if base is None else hash_file(base)
    return Installed(slot=slot, sha256=hash_file(path), path=path, base=base, base_sha256=of_base)


async def test_an_adapter_is_tried_over_its_model(
    trial: EngineTrial, model_path: Path, tmp_path: Path
) -> None:
    alone = version("models/it", model_path)
    file = write_made(tmp_path / "it.gguf", model_path, 1, strength=0.5)
    adapter = version("adapters/it", file, model_path)
    (plain,) = await trial.answers(alone, PROMPTS)
    (adapted,) = await trial.answers(adapter, PROMPTS)
    assert plain.tokens > 0 and plain.text.strip() and adapted.text != plain.text
    assert await trial.perplexity(adapter, TEXT) > 1.2 * await trial.perplexity(alone, TEXT), "random numbers"


async def test_what_is_no_adapter_and_no_head_fails_its_trial(
    trial: EngineTrial, model_path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copyfile(write_made(tmp_path / "it.gguf", model_path, 1), broken)
    with broken.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises((AdapterError, ModelFileError)):
        await trial.answers(version("adapters/it", broken, model_path), PROMPTS)
    with pytest.raises(ModelFileError, match="no draft head"):
        await trial.answers(version("checkpoints/it", tmp_path / "it.gguf", model_path), PROMPTS)
