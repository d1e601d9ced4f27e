"""Which tokens of one vocabulary are which of another, so that a model of another family can draft.

A token is the same where its bytes are the same and both are text or both are markers. What the draft model
has no token for is spelled with several of its own; what the target has no token for ends a draft.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from lichen.errors import ConfigError

MIN_SHARED = 0.5  # of the draft model's tokens: with fewer, it could hardly say anything


class Vocabulary(Protocol):
    """The part of `native.Model` that is read here."""

    vocab_size: int

    def marked_piece(self, token: int) -> bytes: ...

    def is_marker(self, token: int) -> bool: ...

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]: ...


class TokenMap:
    """`spelled` and `spoken` translate there and back. shared: of the draft model's tokens, those that the
    target has too. Raises ConfigError where these are too few."""

    def __init__(self, target: Vocabulary, draft: Vocabulary) -> None:
        ours, theirs = _texts(target), _texts(draft)
        self._draft = draft
        self.identical = ours == theirs
        there = {text: token for token, text in reversed(list(enumerate(theirs))) if text[1]}
        here = {text: token for token, text in reversed(list(enumerate(ours))) if text[1]}
        self._texts = ours
        self._spelled: dict[int, list[int]] = {
            token: [there[text]] for token, text in enumerate(ours) if text in there
        }
        self._spoken = {token: here[text] for token, text in enumerate(theirs) if text in here}
        self.shared = len(self._spoken) / max(1, len(theirs))
        if self.shared < MIN_SHARED:
            raise ConfigError(
                f"The draft model cannot draft for this model: they share {self.shared:.0%} of its "
                f"vocabulary, and {MIN_SHARED:.0%} are needed.",
                hint="Take a smaller model of the same family, or leave draft_model out.",
            )

    def spelled(self, tokens: Iterable[int]) -> list[int]:
        """The draft model's token ids for the target's."""
        if self.identical:
            return list(tokens)
        out: list[int] = []
        for token in tokens:
            found = self._spelled.get(token)
            if found is None:
                found = self._spelled[token] = self._spell(token)
            out += found
        return out

    def spoken(self, token: int) -> int | None:
        """The target's token id for one of the draft model's; None where it has none."""
        return token if self.identical else self._spoken.get(token)

    def _spell(self, token: int) -> list[int]:
        marker, text = self._texts[token]
        try:
            return [] if marker else self._draft.tokenize(text.decode(), special=False, add_bos=False)
        except UnicodeDecodeError:
            return []  # half a character: a guess without it is still a guess


def _texts(vocabulary: Vocabulary) -> list[tuple[bool, bytes]]:
    return [
        (vocabulary.is_marker(token), vocabulary.marked_piece(token))
        for token in range(vocabulary.vocab_size)
    ]
