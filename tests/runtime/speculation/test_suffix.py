"""Looking things up: the index against the recipe, memories against other owners and bad disks."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.runtime.generation import Mailbox
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.speculation import answers
from lichen.runtime.speculation.answers import AnswerMemories, AnswerMemory, read, write
from lichen.runtime.speculation.drafter import NOTHING
from lichen.runtime.speculation.index import (
    MAX_LINKS,
    MAX_MATCH,
    MAX_PLACES,
    MIN_PROBABILITY,
    SEPARATOR,
    SuffixIndex,
)
from lichen.runtime.speculation.suffix import SuffixDrafter

VOCABULARY = 1000
TEXT = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]


def sequence(prompt: list[int], answer: list[int] | None = None, owner: str = "local") -> Sequence:
    made = Sequence(prompt=prompt, options=SamplingOptions(), mailbox=Mock(spec=Mailbox), owner=owner)
    made.tokens += answer or []
    return made


def propose(drafter: SuffixDrafter, asked: Sequence, k: int = 16) -> list[int]:
    drafter.begin(asked)
    return drafter.propose(asked, k).tokens


def recipe(text: list[int], k: int) -> tuple[list[int], float]:
    """Suffix decoding over `text` itself, by plain counting; only for texts within the index's bounds."""
    best: tuple[list[int], float] = ([], 0.0)
    for length in range(MAX_MATCH, 1, -1):
        if length > len(text) - 1:
            continue
        end = text[-length:]
        places = [p for p in range(length, len(text)) if text[p - length : p] == end]
        guess: list[int] = []
        probability, score = 1.0, 0.0
        while places and len(guess) < min(k, length):
            whole = text + guess
            votes = Counter(whole[place] for place in places)
            most = max(votes.values())
            # Of equals, the token at the place with the longest match, then the latest.
            token = next(
                whole[place]
                for place in sorted(places, key=lambda p: (_match(text, p - len(guess)), p), reverse=True)
                if votes[whole[place]] == most
            )
            probability *= most / len(places)
            if probability < MIN_PROBABILITY:
                break
            guess.append(token)
            score += probability
            places = [place + 1 for place in places if whole[place] == token]
        if score > best[1] + 1e-12:
            best = (guess, score)
    return best


def _match(text: list[int], place: int) -> int:
    length = 0
    while length < min(place, MAX_MATCH) and text[place - 1 - length] == text[-1 - length]:
        length += 1
    return length


@settings(max_examples=300)
@given(st.lists(st.integers(0, 3), max_size=MAX_PLACES + 1), st.integers(1, 16))
def test_the_index_says_what_the_recipe_says(text: list[int], k: int) -> None:
    """Up to four lengths of match are tried; a text of a dozen tokens has hardly more."""
    guess, score, match = SuffixIndex(text).continuation(text[-MAX_MATCH:], k)
    assert len(guess) <= min(k, match)
    lengths = {_match(text, p) for p in range(2, len(text)) if text[p - 2 : p] == text[-2:]}
    if len(lengths) <= 4:
        expected, expected_score = recipe(text, k)
        assert score == pytest.approx(expected_score)
        assert guess == expected


@given(st.lists(st.integers(0, 5), max_size=200), st.integers(1, 199))
def test_it_does_not_matter_in_how_many_pieces_a_text_came(text: list[int], cut: int) -> None:
    whole, pieces = SuffixIndex(text), SuffixIndex(text[:cut])
    pieces.extend(text[cut:])
    tail = text[-MAX_MATCH:]
    assert whole.continuation(tail, 16) == pieces.continuation(tail, 16)


def test_a_copy_is_followed_as_far_as_the_match_is_long() -> None:
    drafter = SuffixDrafter()
    asked = sequence([1, 2, *TEXT, 3, 4], TEXT[:2])
    assert propose(drafter, asked) == TEXT[2:4]
    asked.tokens += TEXT[2:6]
    assert drafter.propose(asked, 16).tokens == TEXT[6:12]
    assert drafter.propose(asked, 3).tokens == TEXT[6:9]


def test_a_loop_goes_on_beyond_its_own_end() -> None:
    assert propose(SuffixDrafter(), sequence([5, 6, 7] * 8)) == ([5, 6, 7] * 6)[:16]


def test_what_never_occurred_is_not_guessed() -> None:
    assert propose(SuffixDrafter(), sequence(list(range(50)))) == []
    assert propose(SuffixDrafter(), sequence([1])) == []
    drafter = SuffixDrafter()
    asked = sequence([1, 2, 3])
    drafter.begin(asked)
    assert drafter.propose(asked, 16) is NOTHING


def test_the_more_frequent_continuation_is_taken() -> None:
    assert propose(SuffixDrafter(), sequence([1, 2, 5, 8, 1, 2, 6, 8, 1, 2, 5, 9, 1, 2, 5, 7, 1, 2]), 1) == [
        5
    ]


def test_an_earlier_answer_helps_its_owner_and_nobody_else() -> None:
    drafter = SuffixDrafter(AnswerMemories("model", VOCABULARY))
    first = sequence([1], TEXT, owner="ann")
    propose(drafter, first)
    drafter.end(first)
    assert propose(drafter, sequence([2], TEXT[:4], owner="ann"))[:4] == TEXT[4:8]
    assert propose(drafter, sequence([2], TEXT[:4], owner="bob")) == []
    drafter.close()


def test_a_guess_never_goes_on_into_another_answer() -> None:
    memory = AnswerMemory()
    memory.add(TEXT)
    memory.add(list(range(100, 120)))
    guess, _, _ = memory.indexes[0].continuation(TEXT[-6:-1], 16)
    assert guess == TEXT[-1:]


def test_memory_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "GENERATION", 100)
    memory = AnswerMemory()
    for number in range(50):
        memory.add([number] * 30)
        assert len(memory.tokens()) <= 200
    kept = set(memory.tokens()) - {SEPARATOR}
    assert max(kept) == 49 and min(kept) > 40
    memory.add(list(range(500)))
    assert len(memory.tokens()) <= 200


def test_short_answers_teach_nothing() -> None:
    memory = AnswerMemory()
    memory.add([1, 2, 3])
    assert memory.tokens() == []


def test_answers_outlive_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    memories = AnswerMemories("model", VOCABULARY, folder, 1 << 20)
    memories.add("ann", TEXT)
    memories.close()
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    again = AnswerMemories("model", VOCABULARY, folder, 1 << 20)
    found = again.open("ann")
    other = again.open("bob")
    again._disk.shutdown(wait=True)
    assert found.tokens() == [*TEXT, SEPARATOR]
    assert other.tokens() == []
    elsewhere = AnswerMemories("another model", VOCABULARY, folder, 1 << 20)
    nothing = elsewhere.open("ann")
    elsewhere.close()
    assert nothing.tokens() == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:10], "length"),
        (lambda data: b"", "length"),
        (lambda data: data + bytes(1 << 20), "length"),
        (lambda data: b"X" + data[1:], "format"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "damaged"),
        (lambda data: data[:-4], "damaged"),
        (lambda data: data[:20] + bytes(20) + data[40:], "somebody else"),
    ],
)
def test_a_damaged_file_is_dropped_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, words: str
) -> None:
    memories = AnswerMemories("model", VOCABULARY, tmp_path, 1 << 20)
    memories.add("ann", TEXT)
    memories.close()
    (file,) = tmp_path.iterdir()
    assert callable(damage)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, "lichen.speculation"):
        again = AnswerMemories("model", VOCABULARY, tmp_path, 1 << 20)
        memory = again.open("ann")
        again.close()
    assert memory.tokens() == []
    assert words in caplog.text
    assert not file.exists()


@pytest.mark.parametrize("token", [-2, VOCABULARY, 1 << 30])
def test_tokens_that_the_model_does_not_have_never_reach_it(tmp_path: Path, token: int) -> None:
    path = tmp_path / "file"
    write(path, bytes(32), [1, 2, token])
    with pytest.raises(ValueError, match="does not have"):
        read(path, bytes(32), VOCABULARY)


def test_the_disk_holds_no_more_than_it_may(tmp_path: Path) -> None:
    memories = AnswerMemories("model", VOCABULARY, tmp_path, 1000)
    for owner in range(30):
        memories.add(f"owner {owner}", TEXT * 3)
    memories.close()
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


def test_a_disk_that_cannot_be_used_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    memories = AnswerMemories("model", VOCABULARY, tmp_path / "file" / "answers", 1 << 20)
    memories.add("ann", TEXT)
    assert memories.open("ann").tokens() == [*TEXT, SEPARATOR]
    memories.close()
    assert "cannot be" in caplog.text


def test_a_proposal_is_cheap() -> None:
    """Over a text of 4,000 tokens with much repetition, and a full memory beside it."""
    chance = random.Random(1)
    words = [[chance.randrange(VOCABULARY) for _ in range(12)] for _ in range(60)]

    def text(length: int) -> list[int]:
        out: list[int] = []
        while len(out) < length:
            out += chance.choice(words)
        return out[:length]

    drafter = SuffixDrafter(AnswerMemories("model", VOCABULARY))
    for _ in range(20):
        done = sequence([1], text(1500))
        propose(drafter, done, 1)
        drafter.end(done)
    asked = sequence(text(4000))
    propose(drafter, asked)
    spent = []
    for token in text(400):
        asked.tokens.append(token)
        began = time.perf_counter()
        drafter.propose(asked, 16)
        spent.append(time.perf_counter() - began)
    median = sorted(spent)[len(spent) // 2]
    print(f"median {median * 1e6:.0f} us, highest {max(spent) * 1e6:.0f} us, {MAX_LINKS} links")
    assert median < 0.5e-3, "0.1 to 0.2 ms on a quiet machine"
