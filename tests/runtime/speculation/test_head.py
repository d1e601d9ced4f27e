"""The head in the engine: what it reads and drafts, what is collected, how one head follows another."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from lichen.adapters.draft_head import DraftHead, HeadFacts, HeadWeights, write_head
from lichen.adapters.states import read_segments, segment_files, write_segment
from lichen.runtime.generation import Mailbox
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.runtime.speculation import distil
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.runtime.speculation.distil import StateCollector
from lichen.runtime.speculation.drafter import NOTHING
from lichen.runtime.speculation.head import LONGEST_REST, PATIENCE, HeadDrafter
from lichen.runtime.speculation.heads import HeadStore, head_folder
from lichen.sync.download import hash_file
from tests.runtime.speculation.small_native import Eager
from tests.runtime.speculation.test_real import PROMPTS, Noise, answer, check, noise

__all__ = ["noise"]

VOCABULARY, HIDDEN = 12, 4
BASE = "ab" * 32


def counting_head(
    *, vocabulary: int = VOCABULARY, hidden: int = HIDDEN, base: str = BASE, sure: float = 20
) -> DraftHead:
    """After token n it is as sure of n + 1 as `sure` says, whatever the state."""
    words = np.arange(vocabulary)
    table = np.eye(vocabulary + 1, vocabulary, dtype=np.float32)
    weights = HeadWeights(
        words=words,
        a_weight=np.zeros((vocabulary, hidden), np.float32),
        a_bias=np.zeros(vocabulary, np.float32),
        w_weight=np.concatenate([np.zeros((vocabulary,) * 2), 8 * np.eye(vocabulary)], 1).astype(np.float32),
        w_bias=np.zeros(vocabulary, np.float32),
        d_weight=np.roll(np.eye(vocabulary), 1, axis=0).astype(np.float32),
        table=table,
        output=(sure / 8 * np.eye(vocabulary)).astype(np.float32),
        output_bias=np.zeros(vocabulary, np.float32),
    )
    return DraftHead(HeadFacts(base=base, vocabulary=vocabulary), weights)


def sequence(*tokens: int, kept: bool = True) -> Sequence:
    made = Sequence(prompt=[0], options=SamplingOptions(), mailbox=Mock(spec=Mailbox), kept=kept)
    made.tokens += tokens
    return made


def context(state: Any = None, logits: Any = None) -> Mock:
    given = np.zeros(HIDDEN, np.float32) if state is None else state
    rows = np.arange(VOCABULARY * 2, dtype=np.float32) if logits is None else logits
    return Mock(has_states=True, state=Mock(return_value=given), logits=Mock(return_value=rows))


# ---- the drafter ------------------------------------------------------------------------------------


def test_it_drafts_from_the_state_before_the_last_token() -> None:
    drafter, live = HeadDrafter(counting_head()), sequence(1, 2)
    drafter.begin(live)
    assert drafter.propose(live, 4) is NOTHING  # no state was read yet
    drafter.read(live, context(), 0)
    live.tokens.append(3)
    draft = drafter.propose(live, 4)
    assert draft.tokens[0] == 4
    assert draft.kind.startswith("head/")
    live.tokens.append(4)
    assert drafter.propose(live, 4) is NOTHING  # a step without states: that one is of another place
    drafter.end(live)


def test_how_sure_it_is_makes_the_kind() -> None:
    kinds = []
    for sure in (3.5, 5, 20):
        drafter, live = HeadDrafter(counting_head(sure=sure)), sequence(1)
        drafter.read(live, context(), 0)
        live.tokens.append(2)
        kinds.append(drafter.propose(live, 1).kind)
    assert len(set(kinds)) == 3 and kinds == sorted(kinds)


def test_without_a_head_it_drafts_nothing_until_one_is_swapped_in() -> None:
    drafter, live = HeadDrafter(), sequence(1)
    drafter.read(live, context(), 0)
    live.tokens.append(2)
    assert drafter.propose(live, 4) is NOTHING
    drafter.swap(counting_head())
    drafter.read(live, context(), 0)
    live.tokens.append(3)
    assert drafter.propose(live, 1).tokens == [4]


def test_guesses_that_nobody_wants_become_rare() -> None:
    drafter, live = HeadDrafter(counting_head()), sequence(1)
    drafter.read(live, context(), 0)
    live.tokens.append(2)
    wanted = [bool(drafter.propose(live, 1).tokens) for _ in range(4000)]
    assert all(wanted[:PATIENCE]) and not any(wanted[PATIENCE : 2 * PATIENCE])
    late = sum(wanted[-1000:])
    assert 0 < late <= 1000 * PATIENCE / LONGEST_REST + PATIENCE
    while not (draft := drafter.propose(live, 1)).tokens:
        continue
    drafter.observe(live, draft, 1)
    assert all(drafter.propose(live, 1).tokens for _ in range(PATIENCE))


# ---- collecting -------------------------------------------------------------------------------------


def collect(collector: StateCollector, count: int, *, kept: bool = True, skip: int = -1) -> Sequence:
    live = sequence(1, kept=kept)
    collector.begin(live)
    for number in range(count):
        if number != skip:
            collector.read(live, context(np.full(HIDDEN, number, np.float32)), 0)
        live.tokens.append(number % 10)
    collector.end(live)
    collector.end(live)
    return live


def collected(collector: StateCollector) -> list[Any]:
    collector.flush()
    return list(read_segments(segment_files(collector.folder), hidden=HIDDEN, vocabulary=VOCABULARY * 2))


@pytest.fixture
def collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateCollector]:
    monkeypatch.setattr(distil, "WAITING_ROWS", 10_000)
    made = StateCollector(tmp_path / "states", 1_000_000)
    yield made
    made.close()


def test_states_stand_beside_the_tokens_that_they_gave(collector: StateCollector) -> None:
    live = collect(collector, 20)
    (run,) = collected(collector)
    assert run.tokens.tolist() == live.tokens[1:]
    assert run.states[:, 0].tolist() == list(range(20))
    assert run.top[0].tolist() == list(range(23, 7, -1)) and collector.collected == 20
    assert (collector.folder.stat().st_mode & 0o777, collector.dropped) == (0o700, 0)


def test_an_answer_is_cut_where_a_state_is_missing(collector: StateCollector) -> None:
    live = collect(collector, 30, skip=12)
    first, second = collected(collector)
    assert first.tokens.tolist() == live.tokens[1:14] and len(first) == 12
    assert second.tokens.tolist() == live.tokens[14:] and second.states[0, 0] == 13


def test_only_what_may_be_kept_is_collected(collector: StateCollector) -> None:
    collect(collector, 30, kept=False)
    assert collected(collector) == [] and not collector.folder.exists()


def test_the_oldest_go_when_the_room_is_used_up(tmp_path: Path) -> None:
    collector = StateCollector(tmp_path / "states", 25_000)
    for _ in range(12):
        collect(collector, 40)
        collector.flush()
    names = [path.name for path in segment_files(collector.folder)]
    assert names[-1] == "00000012.states" and 1 < len(names) < 12
    assert sum(path.stat().st_size for path in segment_files(collector.folder)) <= 25_000
    collector.close()


def test_a_slow_side_thread_costs_rows_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "WAITING_ROWS", 0)
    collector = StateCollector(tmp_path / "states", 1_000_000)
    collect(collector, 30)
    assert collected(collector) == [] and collector.dropped == 30
    collector.close()


def test_a_full_disk_is_one_line_in_the_log_and_no_more(
    collector: StateCollector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distil, "write_segment", full)
    for _ in range(3):
        collect(collector, 20)
        collector.flush()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the disk is full" in caplog.text and collector.dropped == 60
    monkeypatch.setattr(distil, "write_segment", write_segment)
    collect(collector, 20)
    assert len(collected(collector)) == 1


def test_many_answers_at_once_are_collected_in_part(collector: StateCollector) -> None:
    live = [sequence(1) for _ in range(distil.AT_ONCE + 3)]
    for one in live:
        collector.begin(one)
    for number in range(10):
        for one in live:
            collector.read(one, context(), 0)
            one.tokens.append(number)
    for one in live:
        collector.end(one)
    assert len(collected(collector)) == distil.AT_ONCE


# ---- versions ---------------------------------------------------------------------------------------


def store(folder: Path) -> HeadStore:
    return HeadStore(folder, base=BASE, vocabulary=VOCABULARY, hidden=HIDDEN)


def test_a_head_outlives_the_process_and_can_be_rolled_back(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert first.current() is None and first.previous() is None
    for sure in (1, 2, 3, 4, 5, 6, 7):
        first.add(counting_head(sure=sure))
    again = store(tmp_path)
    head = again.current()
    assert again.version == 7 and head is not None
    assert head.weights.output[0, 0] == pytest.approx(7 / 8, abs=1e-3)
    assert len(list(tmp_path.glob("*.gguf"))) == 4
    again.roll_back()
    rolled = store(tmp_path)
    assert rolled.version == 6 and rolled.current() is not None and rolled.previous() is None
    assert rolled.add(counting_head()) == 8


@pytest.mark.parametrize("damage", ["cut", "foreign", "gone", "note"])
def test_what_is_wrong_with_a_head_costs_only_the_head(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path)
    made.add(counting_head(sure=1))
    made.add(counting_head(sure=2))
    path = made.path(2)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "foreign":
        write_head(path, counting_head(base="cd" * 32))
    elif damage == "gone":
        path.unlink()
    else:
        (tmp_path / "serving.json").write_text("{")
    found = store(tmp_path).current()
    if damage == "note":
        assert found is None
    else:
        assert found is not None and found.weights.output[0, 0] == pytest.approx(1 / 8, abs=1e-3)
        assert "Version 2 of the draft head is left out" in caplog.text


# ---- the real model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_home(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a head for the real model: it always guesses the next token id, which is mostly wrong."""
    home = tmp_path_factory.mktemp("heads")
    base = hash_file(model_path)
    made = HeadStore(head_folder(home, base), base=base, vocabulary=49_152, hidden=576)
    chance = np.random.default_rng(1)
    words = np.sort(chance.permutation(2000)[:512])

    def numbers(*shape: int) -> Any:
        return chance.normal(0, 0.2, shape).astype(np.float32)

    weights = HeadWeights(
        words=words,
        a_weight=numbers(16, 576),
        a_bias=numbers(16),
        w_weight=numbers(32, 32),
        w_bias=numbers(32),
        d_weight=numbers(16, 32),
        table=numbers(513, 16),
        output=numbers(512, 16) * 8,
        output_bias=numbers(512),
    )
    made.add(DraftHead(HeadFacts(base=base, vocabulary=49_152), weights))
    return home


@pytest.fixture(scope="module")
def headed(model_path: Path, head_home: Path) -> Iterator[ServedModel]:
    speculation = SpeculationOptions(drafters="head", home=head_home, distil_limit=10_000_000)
    options = ModelOptions(context=512, slots=2, threads=2, speculation=speculation)
    served = ServedModel.load(model_path, name="headed", sha256="", options=options)
    served.engine.speculation.controller = Eager()
    yield served
    served.close()


async def test_a_wrong_head_changes_nothing_and_is_swapped_while_it_drafts(
    headed: ServedModel, noise: Noise
) -> None:
    (plain,) = await answer(headed, PROMPTS[3], "greedy", speculation=False)
    (drafted,) = await answer(headed, PROMPTS[3], "greedy", speculation=True)
    check(noise, plain, drafted, {})
    assert drafted.drafted > 8
    (drafter,) = headed.engine.speculation.drafters
    assert isinstance(drafter, HeadDrafter)
    head = drafter.head
    asked = asyncio.ensure_future(answer(headed, PROMPTS[4], "greedy", speculation=True))
    for one in (None, head, None, head):
        headed.engine.call(functools.partial(drafter.swap, one))
        await asyncio.sleep(0.02)
    (swapped,) = await asked
    (plain,) = await answer(headed, PROMPTS[4], "greedy", speculation=False)
    check(noise, plain, swapped, {})


async def test_states_of_the_real_model_are_those_of_its_embeddings(headed: ServedModel) -> None:
    """What is collected says what the model thought: its likeliest token is the one that was drawn."""
    options = SamplingOptions(temperature=0, max_tokens=24)
    for kept in (False, True):
        (generation,) = await headed.chat([{"role": "user", "content": "Count."}], options, kept=kept)
        await generation.text()
    await asyncio.to_thread(headed.flush_states)
    assert headed.learning is not None
    folder = headed.learning.store.folder / "states"
    (run,) = read_segments(segment_files(folder), hidden=576, vocabulary=49_152)
    assert run.tokens[1:].tolist() == run.top[:, 0].tolist()
    assert run.tokens.tolist() == generation.sequence.tokens[-len(run.tokens) :]
    assert 0.5 < run.states.astype(np.float32).std() < 5


def test_a_foreign_head_is_told_and_the_model_is_served_without(
    model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_head(tmp_path / "foreign.gguf", counting_head())
    speculation = SpeculationOptions(drafters="head", home=tmp_path, draft_head=tmp_path / "foreign.gguf")
    options = ModelOptions(context=128, slots=1, threads=1, speculation=speculation)
    served = ServedModel.load(model_path, name="m", sha256="", options=options)
    assert served.engine.speculation.drafters == [] and "another model" in caplog.text
    served.close()
