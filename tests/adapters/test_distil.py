"""States on the disk, and the process that makes a draft head of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.adapters.distil import split
from lichen.adapters.distil_task import DistilTask
from lichen.adapters.draft_head import read_head, write_head
from lichen.adapters.events import Compared, Event, Finished, Saved, Stepped, Stopped
from lichen.adapters.grading import grade
from lichen.adapters.head_training import HeadNetwork, HeadTrainer, Lessons, most_used
from lichen.adapters.launch import CHECKPOINT, DISTIL, Training, prepare
from lichen.adapters.states import TOP, Run, likeliest, read_segments, segment_files, write_segment
from lichen.errors import TrainingError
from tests.adapters.small_language import FIRST, language
from tests.models.tiny_models import VOCABULARY, WIDTH, write_tiny

BASE = "ab" * 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_tiny(path, "llama", layers=1)
    return path


def task(tmp_path: Path, model: Path, **options: Any) -> DistilTask:
    given: dict[str, Any] = {
        "model": str(model),
        "base": BASE,
        "states": str(tmp_path / "states"),
        "segments": tuple(path.name for path in segment_files(tmp_path / "states")),
        "output": str(tmp_path / "new.head.gguf"),
        "words": 64,
        "width": 24,
        "inner": 48,
        "steps": 60,
        "batch": 64,
        "rate": 1e-2,
    }
    return DistilTask(**(given | options))


# ---- segments ---------------------------------------------------------------------------------------


def test_the_likeliest_tokens_are_those_of_a_whole_sort() -> None:
    chance = np.random.default_rng(1)
    for size in (20, 256 * 16, 256 * 20 + 7, 49_152):
        logits = chance.normal(0, 3, size).astype(np.float32)
        top, chances = likeliest(logits)
        assert top.tolist() == np.argsort(-logits)[:TOP].tolist()
        exact = logits[top] - np.log(np.exp(logits.astype(np.float64)).sum())
        assert np.abs(chances - exact).max() < 0.02


def test_runs_survive_their_files(tmp_path: Path) -> None:
    first, second = language(1, 3), language(2, 1, length=9)
    write_segment(tmp_path, first)
    path = write_segment(tmp_path, second)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in segment_files(tmp_path)] == ["00000001.states", "00000002.states"]
    back = list(read_segments(segment_files(tmp_path), hidden=WIDTH, vocabulary=VOCABULARY))
    assert [len(run) for run in back] == [40, 40, 40, 9]
    for ours, theirs in zip(back, [*first, *second], strict=True):
        for name in Run.__slots__:
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle", "foreign"])
def test_a_damaged_segment_is_left_out(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_segment(tmp_path, language(1, 2))
    write_segment(tmp_path, language(2, 1))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    if damage == "pickle":
        with path.open("wb") as file:
            np.savez(file, lengths=np.array([{"a": 1}], object), tokens=1, states=1, top=1, chances=1)
    elif damage == "foreign":
        write_segment(tmp_path / "other", [Run(np.full(9, 400, np.int32), *_rest(language(1, 1, length=8)))])
        path.write_bytes((tmp_path / "other" / "00000001.states").read_bytes())
    else:
        path.write_bytes({"cut": bytes(data[:500]), "flipped": bytes(data), "empty": b""}[damage])
    back = list(read_segments(segment_files(tmp_path), hidden=WIDTH, vocabulary=VOCABULARY))
    assert len(back) == 1 and "00000001.states is left out" in caplog.text
    assert list(read_segments([tmp_path / "00000009.states"], hidden=WIDTH, vocabulary=VOCABULARY)) == []


def _rest(runs: list[Run]) -> tuple[Any, Any, Any]:
    return runs[0].states, runs[0].top, runs[0].chances


# ---- training ---------------------------------------------------------------------------------------


def test_lessons_pair_states_with_what_follows() -> None:
    runs = language(1, 2, length=5)
    lessons = Lessons(runs, np.arange(VOCABULARY), 3)
    assert len(lessons) == 8  # the last place of each run has nothing behind it
    got_states, read, said, top, chances, there = lessons.batch(torch.tensor([0, 3, 4]))
    for row, (run, place) in enumerate(((0, 0), (0, 3), (1, 0))):
        own = runs[run]
        assert np.array_equal(got_states[row].numpy(), own.states[place].astype(np.float32))
        for position in range(3):
            known = place + position + 1 < 5
            assert bool(there[row, position]) is known
            if known:
                assert int(read[row, position]) == own.tokens[place + position + 1]
                assert int(said[row, position]) == own.tokens[place + position + 2]
                assert int(top[row, position, 0]) == own.tokens[place + position + 2]
                assert chances[row, position, 0] == 1


def test_a_head_learns_the_language_of_its_states(tmp_path: Path, model: Path) -> None:
    trainer = HeadTrainer(task(tmp_path, model), language(1, 20), None, VOCABULARY)
    losses = [trainer.advance()[0] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    found = grade(trainer.head(), language(2, 5), step_s=0.01)
    assert found is not None and min(found.acceptance) > 0.95


def test_what_is_served_computes_what_was_trained(tmp_path: Path, model: Path) -> None:
    trainer = HeadTrainer(task(tmp_path, model), language(1, 5), None, VOCABULARY)
    for _ in range(3):
        trainer.advance()
    write_head(tmp_path / "h.gguf", trainer.head())
    head = read_head(tmp_path / "h.gguf", base=BASE, vocabulary=VOCABULARY, hidden=WIDTH)
    states = torch.from_numpy(language(3, 1)[0].states.astype(np.float32))
    rows = torch.from_numpy(head.rows(language(3, 1)[0].tokens[1:]))[:, None]
    with torch.no_grad():
        exact = HeadNetwork(head.weights)(states, rows)[:, 0].numpy()
    numbers = head.logits(head.advance(head.begin(states.numpy()), rows[:, 0].numpy()))
    assert np.abs(numbers - exact).max() < 1e-4


def test_words_are_the_most_used_tokens() -> None:
    runs = language(1, 8)
    used = {int(token) for run in runs for token in run.tokens}
    words = most_used(runs, VOCABULARY, len(used))
    assert words.tolist() == sorted(used)


def test_a_head_goes_on_with_other_words(tmp_path: Path, model: Path) -> None:
    """Words that stay keep their rows; new ones begin with a guess from the model's embeddings."""
    first = HeadTrainer(task(tmp_path, model, words=48), language(1, 10), None, VOCABULARY).head()
    moved = language(1, 10)
    for run in moved:
        run.tokens[run.tokens == FIRST + 1] = 7
        run.top[:, 1] = 8
    trainer = HeadTrainer(task(tmp_path, model), moved, first, VOCABULARY)
    head = trainer.head()
    assert 7 in head.words and len(head.words) == 48
    kept = np.intersect1d(first.words, head.words)
    assert np.allclose(first.weights.output[first.rows(kept)], head.weights.output[head.rows(kept)])
    assert np.abs(head.weights.output[head.rows([7])]).max() > 0
    assert head.facts.tokens == 2 * first.facts.tokens
    trainer.advance()


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, model: Path) -> None:
    runs = language(1, 6)

    def fresh() -> HeadTrainer:
        return HeadTrainer(task(tmp_path, model), runs, None, VOCABULARY)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(6):
        whole.advance()
    for _ in range(3):
        first.advance()
    second.restore(first.state())
    for _ in range(3):
        second.advance()
    for ours, theirs in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_newest_answers_are_held_out() -> None:
    runs = language(1, 10)
    train, held_out = split(runs, 0.15)
    assert train == runs[:8] and held_out == runs[8:]
    with pytest.raises(TrainingError, match="no answers"):
        split(runs[:1], 0.5)


# ---- the process ------------------------------------------------------------------------------------


def events_of(training: Training) -> Iterator[Event]:
    yield from training


def test_the_process_makes_a_head_and_goes_on_after_a_stop(tmp_path: Path, model: Path) -> None:
    write_segment(tmp_path / "states", language(1, 30))
    folder = tmp_path / "job"
    prepare(folder, task(tmp_path, model, steps=4000, checkpoint=0))
    training = Training(folder, DISTIL)
    events: list[Event] = []
    for event in training:
        events.append(event)
        if isinstance(event, Saved):
            training.stop()
    assert isinstance(events[-1], Stopped) and 0 < events[-1].step < 4000
    assert (folder / CHECKPOINT).exists() and not (tmp_path / "new.head.gguf").exists()
    assert training.process.returncode == 3
    assert list(folder.glob("*.partial")) == []


def test_only_a_better_head_is_written(tmp_path: Path, model: Path) -> None:
    write_segment(tmp_path / "states", language(1, 30))
    folder, output = tmp_path / "job", tmp_path / "new.head.gguf"
    prepare(folder, task(tmp_path, model))
    events = list(Training(folder, DISTIL))
    (compared,) = (event for event in events if isinstance(event, Compared))
    assert compared.better and compared.old is None and compared.new.acceptance[0] > 0.9
    assert isinstance(events[-1], Finished) and any(isinstance(event, Stepped) for event in events)
    head = read_head(output, base=BASE, vocabulary=VOCABULARY, hidden=WIDTH)
    assert head.facts.acceptance == pytest.approx(compared.new.acceptance) and head.facts.steps == 60
    start = output.rename(tmp_path / "start.gguf")
    prepare(folder, task(tmp_path, model, start=str(start), steps=1, rate=1.0))  # as good as it gets already
    (compared,) = (event for event in Training(folder, DISTIL) if isinstance(event, Compared))
    assert not compared.better and compared.old is not None and not output.exists()


def test_a_start_that_is_damaged_is_told(tmp_path: Path, model: Path) -> None:
    write_segment(tmp_path / "states", language(1, 3))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    prepare(tmp_path / "job", task(tmp_path, model, start=str(tmp_path / "bad.gguf")))
    with pytest.raises(TrainingError, match=r"bad\.gguf"):
        list(Training(tmp_path / "job", DISTIL))


def test_nothing_to_learn_from_is_told(tmp_path: Path, model: Path) -> None:
    prepare(tmp_path / "job", task(tmp_path, model, segments=("00000001.states",)))
    with pytest.raises(TrainingError, match="no answers to learn from"):
        list(Training(tmp_path / "job", DISTIL))
