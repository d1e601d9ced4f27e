"""A draft model: what it reads, what it says, and which vocabularies it may come from."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from lichen.errors import ConfigError
from lichen.runtime.generation import Mailbox
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.speculation.model import CATCH_UP, ModelDrafter
from lichen.runtime.speculation.vocabulary import TokenMap
from tests.runtime.speculation.small_native import SmallContext, SmallModel, likeliest


class Words:
    """A vocabulary of given texts; those in <…> are markers. Tokenizes letter by letter."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.vocab_size = len(texts)

    def marked_piece(self, token: int) -> bytes:
        return self.texts[token].encode()

    def is_marker(self, token: int) -> bool:
        return self.texts[token].startswith("<")

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        assert not special and not add_bos
        return [self.texts.index(letter) for letter in text if letter in self.texts]


def test_equal_vocabularies_need_no_map() -> None:
    tokens = TokenMap(Words("a", "b", "<end>"), Words("a", "b", "<end>"))
    assert tokens.identical
    assert tokens.spelled([2, 0]) == [2, 0] and tokens.spoken(1) == 1


def test_other_numbers_and_missing_words_are_translated() -> None:
    tokens = TokenMap(Words("a", "b", "ab", "<end>", "c"), Words("<end>", "b", "a", "x"))
    assert tokens.spelled([0, 1, 3]) == [2, 1, 0]
    assert tokens.spelled([2]) == [2, 1], "spelled with what there is"
    assert tokens.spelled([4]) == [], "nothing to spell it with"
    assert [tokens.spoken(token) for token in range(4)] == [3, 1, 0, None]


def test_a_marker_is_not_the_text_that_looks_like_it() -> None:
    plain = Words("a", "<b")
    plain.is_marker = lambda token: False  # type: ignore[method-assign]
    tokens = TokenMap(Words("a", "<b"), plain)
    assert tokens.spoken(1) is None and tokens.spelled([1]) == []


def test_vocabularies_that_share_too_little_are_refused_with_the_share() -> None:
    with pytest.raises(ConfigError, match="share 25% of its vocabulary"):
        TokenMap(Words("a", "b"), Words("a", "x", "y", "z"))


class SmallDraft(SmallModel):
    """The small model with what a vocabulary map reads."""

    def marked_piece(self, token: int) -> bytes:
        return str(token).encode()

    def is_marker(self, token: int) -> bool:
        return False

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        return []


def drafter(context: SmallContext, closed: list[str] | None = None) -> ModelDrafter:
    native: Any = context
    return ModelDrafter(
        native,
        TokenMap(SmallDraft(), SmallDraft()),
        lambda: (closed if closed is not None else []).append("model"),
    )


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(prompt=tokens, options=SamplingOptions(), mailbox=Mock(spec=Mailbox))


def test_it_says_what_the_small_model_would_say() -> None:
    context = SmallContext(slots=2, context=256, batch=64)
    it, asked = drafter(context), sequence([1, 2, 3])
    it.begin(asked)
    draft = it.propose(asked, 6)
    assert draft.tokens == likeliest([2, 3])[: len(draft.tokens)]
    assert draft.tokens and draft.kind == "model"
    assert it.token_s > 0


def test_wrong_guesses_leave_its_cache_and_the_next_ones_are_right_again() -> None:
    context = SmallContext(slots=2, context=256, batch=64)
    it, asked = drafter(context), sequence([1, 2, 3])
    it.begin(asked)
    for token in (5, 7, *likeliest([5, 7], 4), 2, 9):
        draft = it.propose(asked, 6)
        assert draft.tokens == likeliest(asked.tokens)[: len(draft.tokens)]
        it.observe(asked, draft, 0)
        asked.tokens.append(token)
    (held, *_) = [held for held in context.held.values() if held]
    assert held[: len(asked.tokens) - 1] == asked.tokens[:-1]


def test_a_long_prompt_is_read_over_several_steps() -> None:
    context = SmallContext(slots=1, context=512, batch=CATCH_UP)
    it, asked = drafter(context), sequence([n % 9 for n in range(200)])
    it.begin(asked)
    drafts = [it.propose(asked, 4).tokens for _ in range(4)]
    assert drafts[:3] == [[], [], []] and drafts[3]


def test_it_gives_its_slots_back_and_stays_within_its_context() -> None:
    closed: list[str] = []
    context = SmallContext(slots=1, context=16, batch=16)
    it = drafter(context, closed)
    for _ in range(3):
        asked = sequence([2, 3])
        it.begin(asked)
        assert it.propose(asked, 4).tokens
        asked.tokens += [3] * 12
        assert it.propose(asked, 4).tokens == [], "no room in its context"
        it.end(asked)
        it.end(asked)
    it.close()
    assert closed == ["model"] and context.closed


def test_a_failing_decode_is_only_a_missing_draft() -> None:
    context = SmallContext(slots=1, context=64, batch=16)
    it, asked = drafter(context), sequence([2, 3])
    it.begin(asked)
    context.codes = [1]
    assert it.propose(asked, 4).tokens == []
    draft = it.propose(asked, 4)
    assert draft.tokens and draft.tokens == likeliest([2, 3])[: len(draft.tokens)]
