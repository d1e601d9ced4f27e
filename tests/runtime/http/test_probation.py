"""After a promotion, through the door of a daemon: bad ratings take a version back, and nothing else does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lichen.adapters.journal import Journal
from lichen.adapters.registry import Registry
from lichen.adapters.versions import ROLLED_BACK
from lichen.adapters.watch import Lived
from lichen.runtime import probation as probation_module
from lichen.runtime.lives import FILE, Life, Lives
from lichen.runtime.served_model import ServedModel
from tests.adapters.made_adapters import add_made
from tests.conftest import MODEL, daemon_over

NAME = f"{MODEL}:mine"
RATED = 5


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(probation_module, "EVERY_S", 0.02)
    yield


@asynccontextmanager
async def daemon(
    served: ServedModel, registry: Registry, **options: Any
) -> AsyncIterator[openai.AsyncOpenAI]:
    """Listening, and a client of it."""
    home = registry.folder.parent
    given = {"port": 0, "adapters_folder": registry.folder, "learning_folder": home / "learning"}
    found = daemon_over(served, home, **given, **{"journal": "ask", **options})
    async with (
        found.listening(),
        openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key="x", timeout=60) as client,
    ):
        yield client


async def answered(client: openai.AsyncOpenAI, rating: str | None, model: str = NAME) -> str:
    """Ask, and rate what comes; the digest that answered."""
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me of a ferry."}],
        max_tokens=2,
        store=True,
    )
    if rating is not None:
        said = {"response_id": answer.id, "rating": rating}
        await client.post("/feedback", body=said, cast_to=httpx.Response)
    return str((answer.model_extra or {}).get("adapter", {}).get("sha256", ""))


async def settled(registry: Registry, digest: str | None) -> None:
    """Wait until that version serves."""
    for _ in range(500):
        if registry.standing("mine").active == digest:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not go back")


async def test_bad_ratings_take_a_version_back(
    served: ServedModel, registry: Registry, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (add_made(registry, "mine", model_path, seed, rank=1).digest for seed in (1, 2))
    registry.promote("mine", old)
    async with daemon(served, registry) as client:
        assert {await answered(client, "up") for _ in range(RATED)} == {old}
        registry.promote("mine", new)
        with caplog.at_level(logging.WARNING, logger="lichen.learning"):
            for _ in range(RATED - 1):
                assert await answered(client, "down") == new
            await asyncio.sleep(0.2)
            assert registry.standing("mine").active == new, "one person's mood"
            await answered(client, "down")
            await settled(registry, old)
        assert await answered(client, None) == old
        (line,) = [one.getMessage() for one in caplog.records if "went back" in one.getMessage()]
        assert f"mine went back by itself from {new[:12]} to {old[:12]}. Answers are rated down" in line
        (note,) = [one for one in registry.notes("mine", new) if one.kind == ROLLED_BACK]
        assert note.values["to"] == old and "rated down" in note.values["reason"]
        assert (note.values["before"]["up"], note.values["now"]["down"]) == (RATED, RATED)

        registry.promote("mine", new)  # somebody wants it all the same
        assert await answered(client, "down") == new
        await asyncio.sleep(0.3)
        assert registry.standing("mine").active == new, "it goes back once, not to and fro"
    lives = Lives(registry.folder).of("mine")
    assert (lives[old].answers, lives[new].answers) == (RATED + 1, RATED + 1)
    assert lives[new].lived.answers == RATED + 1 and lives[new].lived.loss > 0
    assert lives[new].tokens >= lives[new].answers
    with closing(Journal.open(registry.folder.parent / "learning" / "journal.db")) as journal:
        assert {(one.adapter, one.adapter_sha256) for one in journal.records()} == {
            ("mine", old),
            ("mine", new),
        }
        assert journal.ratings("mine", new) == (0, RATED + 1)


async def test_a_first_version_goes_back_to_the_model_that_people_liked_better(
    served: ServedModel, registry: Registry, model_path: Path
) -> None:
    first = add_made(registry, "mine", model_path, 1, rank=1).digest
    async with daemon(served, registry) as client:
        for _ in range(RATED):
            assert await answered(client, "up", model=MODEL) == ""
        registry.promote("mine", first)
        for _ in range(RATED):
            assert await answered(client, "down", model=NAME) == first
        await settled(registry, None)
        assert await answered(client, None) == "", "the name goes on, with the model alone"
    assert Lives(registry.folder).of("mine")[""].answers == 1


async def test_where_it_is_off_nothing_goes_back(
    served: ServedModel, registry: Registry, model_path: Path
) -> None:
    old, new = (add_made(registry, "mine", model_path, seed, rank=1).digest for seed in (1, 2))
    registry.promote("mine", old)
    async with daemon(served, registry, auto_rollback=False) as client:
        for _ in range(RATED):
            await answered(client, "up")
        registry.promote("mine", new)
        for _ in range(RATED):
            await answered(client, "down")
        await asyncio.sleep(0.3)
    assert registry.standing("mine").active == new and not registry.notes("mine", new)
    assert Lives(registry.folder).of("mine")[new].answers == RATED, "it is counted all the same"


async def test_only_what_was_asked_by_its_name_as_it_is_counts(
    served: ServedModel, registry: Registry, model_path: Path
) -> None:
    only = add_made(registry, "mine", model_path, 1, rank=1).digest
    registry.promote("mine", only)
    async with daemon(served, registry, journal="off") as client:
        for model, scale in ((f"{NAME}@{only}", 1.0), (NAME, 0.5), (MODEL, 1.0), (NAME, 1.0)):
            await client.completions.create(
                model=model, prompt="Hi", max_tokens=1, extra_body={"adapter_scale": scale}
            )
    assert {digest: life.answers for digest, life in Lives(registry.folder).of("mine").items()} == {only: 1}


async def test_lives_without_a_journal_and_a_damaged_file(
    served: ServedModel, registry: Registry, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss that rose takes a version back too; a damaged file is no reason for anything."""
    old, new = (add_made(registry, "mine", model_path, seed, rank=1).digest for seed in (1, 2))
    for digest in (old, new):
        registry.promote("mine", digest)
    (registry.folder / "mine" / FILE).write_bytes(b"nothing that lichen wrote")
    with caplog.at_level(logging.WARNING, logger="lichen.learning"):
        async with daemon(served, registry, journal="off") as client:
            await asyncio.sleep(0.2)
            assert registry.standing("mine").active == new
            assert "is damaged" in caplog.text
            assert await answered_plainly(client) == new
            lives = Lives(registry.folder)
            for digest, loss in ((old, 1.0), (new, 2.0)):
                lived = Lived(answers=100, loss=100 * loss, squares=100 * loss * loss + 10)
                lives._new["mine"] = {**lives._new.get("mine", {}), digest: Life(answers=100, lived=lived)}
            await lives.flush("mine")
            await settled(registry, old)
    assert "The loss on what is answered rises" in registry.notes("mine", new)[-1].values["reason"]


async def answered_plainly(client: openai.AsyncOpenAI) -> str:
    """Ask without keeping it; the digest that answered."""
    answer = await client.completions.create(model=NAME, prompt="Hi", max_tokens=1)
    return str((answer.model_extra or {})["adapter"]["sha256"])
