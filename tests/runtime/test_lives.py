"""What is counted of a version's answers, and that it survives ends, other daemons and damage."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.adapters.registry import Registry
from lichen.runtime.drawing import SCORED
from lichen.runtime.generation import Mailbox
from lichen.runtime.lives import FILE, Life, Lives, life_of
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.served_model import ServedModel

NAME, DIGEST = "mine", "a" * 64


def answer(loss: float, tokens: int = 8, drafted: int = 4, accepted: int = 3) -> Sequence:
    """A complete answer whose scored tokens have that mean loss."""
    sequence = Sequence(prompt=[1], options=SamplingOptions(), mailbox=Mailbox())
    sequence.tokens += range(tokens)
    sequence.scored_tokens = math.ceil(tokens / SCORED)
    sequence.loss = loss * sequence.scored_tokens
    sequence.drafted, sequence.accepted = drafted, accepted
    return sequence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME / DIGEST).mkdir(parents=True)
    return tmp_path


async def test_what_is_counted_comes_back_after_a_restart(folder: Path) -> None:
    lives = Lives(folder)
    told, alone = lives.told(NAME, DIGEST), lives.told(NAME, "")
    for loss in (1.0, 3.0):
        told(answer(loss))
    alone(answer(2.0, tokens=2))
    assert lives.of(NAME) == {}, "nothing is written for each answer"
    await lives.flush(NAME)
    life = Lives(folder).of(NAME)[DIGEST]
    assert (life.answers, life.tokens) == (2, 16)
    assert (life.lived.answers, life.lived.loss, life.lived.squares) == (2, 4.0, 10.0)
    assert (life.lived.drafted, life.lived.accepted) == (8, 6)
    assert 0 < life.since <= life.until
    assert Lives(folder).of(NAME)[""].tokens == 2
    stamp = (folder / NAME / FILE).stat().st_mtime_ns
    await lives.flush(NAME)
    assert (folder / NAME / FILE).stat().st_mtime_ns == stamp, "nothing came, nothing is written"


async def test_two_daemons_over_one_home_lose_nothing(folder: Path) -> None:
    pair = [Lives(folder), Lives(folder)]
    for _ in range(4):
        for lives in pair:
            lives.told(NAME, DIGEST)(answer(1.0))
        await asyncio.gather(*(lives.flush(NAME) for lives in pair))
    assert Lives(folder).of(NAME)[DIGEST].answers == 8


async def test_a_damaged_file_is_rebuilt_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lives = Lives(folder)
    for count in (1, 2):
        for _ in range(count):
            lives.told(NAME, DIGEST)(answer(1.0))
        await lives.flush(NAME)
    path = folder / NAME / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # torn: the one before it counts
    assert lives.of(NAME)[DIGEST].answers == 1
    damages = random.Random(1).randbytes(900), b"", whole.replace(b"answers", b"ansvers")
    for damage in damages:
        path.write_bytes(damage)
        path.with_name(f"{FILE}.previous").write_bytes(b"lichen lives 1 sha256 0\n{}")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert await lives.flush(NAME) == {}
            assert await lives.flush(NAME) == {}
        assert [record.getMessage().count("is damaged") for record in caplog.records] == [1]
        lives.told(NAME, DIGEST)(answer(1.0))
        assert (await lives.flush(NAME))[DIGEST].answers == 1


async def test_what_the_disk_refuses_is_written_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = Lives(folder)
    lives.told(NAME, DIGEST)(answer(1.0))

    def full(_self: object, _body: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lichen.durable.SealedFile.save", full)
        with pytest.raises(OSError, match="No space"):
            await lives.flush(NAME)
    lives.told(NAME, DIGEST)(answer(1.0))
    assert (await lives.flush(NAME))[DIGEST].answers == 2


async def test_versions_and_names_that_are_gone_leave_nothing(folder: Path) -> None:
    lives = Lives(folder)
    gone = "b" * 64
    (folder / NAME / gone).mkdir()
    lives.told(NAME, gone)(answer(1.0))
    await lives.flush(NAME)
    (folder / NAME / gone).rmdir()
    lives.told(NAME, DIGEST)(answer(1.0))
    assert (await lives.flush(NAME)).keys() == {DIGEST}
    lives.told("removed", DIGEST)(answer(1.0))
    assert await lives.flush("removed") == {}
    assert not (folder / "removed").exists()
    assert Registry(folder).names() == [NAME], "its file is no version"


async def test_a_loss_that_is_no_number_is_not_counted() -> None:
    assert life_of(answer(math.nan), 1.0).lived.answers == 0
    assert life_of(answer(1.0, tokens=0), 1.0).lived.answers == 0


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 20), st.floats(1, 1e9)), max_size=8))
def test_lives_add_up_in_any_order(parts: list[tuple[int, float, float]]) -> None:
    lives = [Life(answers=n, tokens=2 * n, since=at, until=at + loss) for n, loss, at in parts]
    forward, backward = sum(lives, Life()), sum(reversed(lives), Life())
    assert forward == backward and forward.answers == sum(n for n, _, _ in parts)


async def test_the_loss_is_that_of_the_model_itself(served: ServedModel) -> None:
    """Against the log-probabilities that a client may ask for: those are before any sampler option too."""
    from lichen.runtime.sequence import Piece

    told: list[Sequence] = []
    view = await served.adapted("mine", None, Path())
    view.life = told.append
    options = SamplingOptions(
        temperature=1.5, seed=7, max_tokens=21, top_logprobs=0, logit_bias={11: 5.0}, frequency_penalty=1.0
    )
    (generation,) = await view.complete("Once upon a time", options)
    rows = [row async for event in generation if isinstance(event, Piece) for row in event.tokens]
    (sequence,) = told
    assert sequence.scored_tokens == math.ceil(sequence.drawn / SCORED)
    expected = -np.sum([row.logprob for row in rows[::SCORED]])
    if len(rows) == sequence.drawn:  # it did not end by itself
        assert sequence.loss == pytest.approx(float(expected), rel=1e-4)
    plain = SamplingOptions(
        temperature=1.5, seed=7, max_tokens=21, logit_bias={11: 5.0}, frequency_penalty=1.0
    )
    (unscored,) = await served.complete("Once upon a time", plain)
    await unscored.text()
    assert unscored.sequence.scored_tokens == 0 and len(told) == 1
    assert unscored.sequence.tokens == sequence.tokens, "scoring changes no draw"
