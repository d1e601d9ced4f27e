"""Draft heads as files and as numbers: round trips, hostile files, numpy beside torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.adapters.draft_head import DraftHead, HeadFacts, HeadWeights, read_head, write_head
from lichen.adapters.grading import grade
from lichen.adapters.head_training import HeadNetwork
from lichen.adapters.states import TOP, Run
from lichen.errors import ModelFileError
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import open_gguf, write_gguf

BASE = "ab" * 32
VOCABULARY, HIDDEN, WORDS, WIDTH, INNER = 50, 12, 20, 8, 16


def made(seed: int = 1, **parts: Any) -> DraftHead:
    chance = np.random.default_rng(seed)

    def numbers(*shape: int) -> Any:
        return chance.normal(0, 0.5, shape).astype(np.float16).astype(np.float32)

    given: dict[str, Any] = {
        "words": np.sort(chance.permutation(VOCABULARY)[:WORDS]),
        "a_weight": numbers(WIDTH, HIDDEN),
        "a_bias": numbers(WIDTH),
        "w_weight": numbers(INNER, 2 * WIDTH),
        "w_bias": numbers(INNER),
        "d_weight": numbers(WIDTH, INNER),
        "table": numbers(WORDS + 1, WIDTH),
        "output": numbers(WORDS, WIDTH),
        "output_bias": numbers(WORDS),
    }
    facts = HeadFacts(base=BASE, vocabulary=VOCABULARY, tokens=7, steps=3, acceptance=(0.5, 0.25))
    return DraftHead(facts, HeadWeights(**(given | parts)))


def read(path: Path, **other: Any) -> DraftHead:
    given: dict[str, Any] = {"base": BASE, "vocabulary": VOCABULARY, "hidden": HIDDEN}
    return read_head(path, **(given | other))


def test_a_head_survives_its_file(tmp_path: Path) -> None:
    head = made()
    write_head(tmp_path / "h.gguf", head)
    back = read(tmp_path / "h.gguf")
    assert back.facts == head.facts
    for name in HeadWeights.__slots__:
        assert np.array_equal(getattr(back.weights, name), getattr(head.weights, name)), name


def test_numpy_computes_what_torch_does() -> None:
    head = made()
    chance = np.random.default_rng(2)
    states = chance.normal(0, 2, (5, HIDDEN)).astype(np.float32)
    rows = chance.integers(0, WORDS + 1, (5, 4))
    with torch.no_grad():
        expected = HeadNetwork(head.weights)(torch.from_numpy(states), torch.from_numpy(rows)).numpy()
    z = head.begin(states)
    alone = [head.begin(state) for state in states]
    for position in range(4):
        z = head.advance(z, rows[:, position])
        assert np.abs(head.logits(z) - expected[:, position]).max() < 1e-4
        for number in range(5):
            alone[number] = head.advance(alone[number], int(rows[number, position]))
            assert np.abs(head.logits(alone[number]) - expected[number, position]).max() < 1e-4


def test_guesses_are_its_words_and_end_where_it_is_unsure() -> None:
    head = made()
    state = np.ones(HIDDEN, np.float32)
    tokens, chances = head.guess(state, 3, 6, 0.0)
    assert len(tokens) == 6 and set(tokens) <= set(head.words.tolist())
    assert all(0 < later <= earlier <= 1 for earlier, later in itertools.pairwise(chances))
    some, _ = head.guess(state, 3, 6, chances[2])
    assert some == tokens[:3]
    assert head.guess(state, 3, 6, 1.1) == ([], [])


def test_a_token_that_is_no_word_may_be_read() -> None:
    head = made()
    strange = next(token for token in range(VOCABULARY) if token not in head.words)
    assert head.rows([strange]).tolist() == [WORDS]
    assert len(head.guess(np.zeros(HIDDEN, np.float32), strange, 2, 0.0)[0]) == 2


def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.gguf"
    write_head(path, made())
    with pytest.raises(ModelFileError, match=r"another model.*lichen distil"):
        read(path, base="cd" * 32)
    with pytest.raises(ModelFileError, match="for 50 tokens; the model has 51"):
        read(path, vocabulary=51)
    with pytest.raises(ModelFileError, match="states of 12 numbers; the model has 16"):
        read(path, hidden=16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.type": "adapter"}, "no draft head"),
        ({"lichen.head.version": 9}, "version 9"),
        ({"lichen.base.sha256": 5}, "for which model"),
        ({"lichen.head.acceptance": ["x"]}, "for which model"),
        ({"lichen.head.words": np.zeros(WORDS, np.int32)}, "words twice"),
        ({"lichen.head.words": np.arange(WORDS, dtype=np.int32) + 40}, "does not have"),
        ({"lichen.head.words": 3}, "no list of words"),
        ({"lichen.head.words": np.arange(WORDS + 1, dtype=np.int32)}, "table has the shape"),
    ],
)
def test_metadata_that_lies_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "h.gguf"
    write_head(path, made())
    with open_gguf(path, model=False) as file:
        metadata: dict[str, Any] = dict(file.metadata) | change
        tensors = [(one.name, one.type, one.shape, bytes(one.data)) for one in file.tensors.values()]
    write_gguf(path, metadata, tensors)
    with pytest.raises(ModelFileError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("output", np.zeros((WORDS, WIDTH + 1), np.float32), "output has the shape"),
        ("a_weight", np.zeros(HIDDEN, np.float32), "widths 0"),
        ("d_weight", np.full((WIDTH, INNER), np.nan, np.float32), "no numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, values: Any, words: str) -> None:
    path = tmp_path / "h.gguf"
    write_head(path, made())
    with open_gguf(path, model=False) as file:
        tensors: list[Any] = [
            (one.name, one.type, one.shape, bytes(one.data))
            for one in file.tensors.values()
            if one.name != name
        ]
        metadata = dict(file.metadata)
    write_gguf(path, metadata, [*tensors, (name, GGMLType.F32, values.shape, values)])
    with pytest.raises(ModelFileError, match=words):
        read(path)
    write_gguf(path, metadata, tensors)
    with pytest.raises(ModelFileError, match=f"no tensor {name}"):
        read(path)


@pytest.mark.parametrize("size", [0, 10, 300, -40])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "h.gguf"
    write_head(path, made())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFileError):
        read(path)


def test_a_grade_is_what_one_guess_after_the_other_gives() -> None:
    head = made()
    chance = np.random.default_rng(3)
    runs = []
    for length in (9, 2, 1):
        tokens = chance.choice(head.words, length + 1).astype(np.int32)
        states = chance.normal(0, 1, (length, HIDDEN)).astype(np.float16)
        for place in range(0, length - 1, 2):  # some that it guesses right
            tokens[place + 2] = head.guess(states[place].astype(np.float32), int(tokens[place + 1]), 1, 0.0)[
                0
            ][0]
        shape = (length, TOP)
        runs.append(Run(tokens, states, np.zeros(shape, np.int32), np.zeros(shape, np.float16)))
    tried, right = [0, 0, 0], [0, 0, 0]
    for run in runs:
        for place in range(len(run) - 1):
            guesses = head.guess(run.states[place].astype(np.float32), int(run.tokens[place + 1]), 3, 0.0)[0]
            for position, (guess, truth) in enumerate(zip(guesses, run.tokens[place + 2 :], strict=False)):
                tried[position] += 1
                right[position] += guess == truth
                if guess != truth:
                    break
    found = grade(head, runs, step_s=0.01)
    assert found is not None and found.drafts == 9
    assert found.acceptance == tuple(round(a / max(1, b), 4) for a, b in zip(right, tried, strict=True))
    assert found.acceptance[0] >= 4 / 9 and found.value >= 100
    assert grade(head, runs[2:], step_s=0.01) is None
