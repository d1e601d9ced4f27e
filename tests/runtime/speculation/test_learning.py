"""A head that learns from what was collected, is swapped in, kept, and taken back when it guesses worse."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from lichen.adapters.draft_head import DraftHead
from lichen.adapters.launch import CHECKPOINT
from lichen.adapters.states import Run, segment_files, write_segment
from lichen.runtime.speculation import learning as learning_module
from lichen.runtime.speculation.distil import StateCollector
from lichen.runtime.speculation.head import HeadDrafter
from lichen.runtime.speculation.heads import HeadStore
from lichen.runtime.speculation.learning import HeadLearning
from tests.adapters.small_language import language
from tests.models.tiny_models import VOCABULARY, WIDTH, write_tiny

BASE = "ab" * 32


class Place:
    """A home, and a learning over it whose answers a test writes itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tiny(folder / "model.gguf", "llama", layers=1)
        self.drafter = HeadDrafter()
        self.swaps: list[DraftHead | None] = []
        self.states = folder / "states"
        self.collector = Mock(spec=StateCollector, folder=self.states, collected=0)
        self.learning = self.begin()

    def begin(self) -> HeadLearning:
        store = HeadStore(self.folder, base=BASE, vocabulary=VOCABULARY, hidden=WIDTH)
        self.drafter.swap(store.current())
        made = HeadLearning(
            self.model,
            store,
            self.drafter,
            self.collector,
            folder=self.folder / "training",
            step_s=lambda: 0.01,
        )
        made.steps, made.fresh = 40, 100
        return made

    def answer(self, runs: list[Run]) -> None:
        write_segment(self.states, runs)
        self.collector.collected += sum(len(run) for run in runs)

    def call(self, function: Callable[[], None]) -> None:
        function()
        self.swaps.append(self.drafter.head)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(learning_module, "POLL_S", 0.02)
    made = Place(tmp_path)
    yield made
    made.learning.close()


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def test_it_learns_swaps_keeps_and_takes_back(place: Place) -> None:
    place.learning.start(place.call)
    place.answer(language(1, 12))
    until(lambda: place.learning.swaps > 0)
    first = place.drafter.head
    assert first is not None and first.facts.acceptance[0] > 0.2
    assert place.learning.store.version == 1 and (place.learning.swaps, place.learning.rollbacks) == (1, 0)
    # a worse head, as if served since: the newest answers show that the one before guesses better
    blank = DraftHead(first.facts, _silent(first))
    place.learning.store.add(blank)
    place.call(lambda: place.drafter.swap(blank))
    place.learning.fresh = 1 << 30
    place.answer(language(2, 40))
    until(lambda: place.learning.rollbacks > 0)
    until(lambda: place.drafter.head is not blank)
    assert place.learning.store.version == 1
    place.learning.close()
    again = place.begin()  # a restart
    assert again.store.version == 1 and place.drafter.head is not None
    assert np.array_equal(place.drafter.head.weights.output, first.weights.output)


def _silent(head: DraftHead) -> Any:
    return dataclasses.replace(head.weights, output=np.zeros_like(head.weights.output))


def test_a_training_that_ends_with_the_daemon_goes_on_with_the_next(place: Place) -> None:
    place.learning.steps = 3000
    place.learning.start(place.call)
    place.answer(language(1, 12))
    until(lambda: place.learning.training is True)
    until((place.folder / "training" / "events.jsonl").exists)
    until(lambda: b"step" in (place.folder / "training" / "events.jsonl").read_bytes())
    place.learning.close()
    assert not place.swaps and (place.folder / "training" / CHECKPOINT).exists()
    place.learning = place.begin()
    place.collector.collected = 0
    place.learning.start(place.call)
    until(lambda: place.learning.training is True)


def test_what_goes_wrong_is_told_and_tried_again_later(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.model.write_bytes(b"GGUF")
    place.learning.start(place.call)
    place.answer(language(1, 12))
    until(lambda: "could not learn" in caplog.text)
    assert place.swaps == [] and segment_files(place.states)


def test_without_torch_it_says_so_and_ends(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learning_module, "find_spec", Mock(return_value=None))
    place.learning.start(place.call)
    until(lambda: "torch is not installed" in caplog.text)
