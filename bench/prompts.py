"""Texts to ask: each is handed out once, so that no server's prefix cache helps where it should not.

Short prompts are questions of Spec-Bench, long ones are passages of tinyshakespeare, both from
`$LICHEN_DATA` or `../shared/data`; without them a built-in generator makes texts of the same length. The
same seed gives the same texts in the same order, so every server is asked the same.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

SHORT_CHARACTERS = range(60, 261)  # about 15 to 60 tokens, the chat template adds some 25
LONG_CHARACTERS = 3000  # about 1,000 tokens of this model's vocabulary; measured, see prompt_tokens

_TASKS = (
    "Write a long story about {}.",
    "Explain to a curious child, in many small steps, how {} came to be.",
    "List twenty surprising facts about {} and comment on each.",
    "Write a letter to a friend who has never heard of {}.",
    "Compare life with and without {}, from morning to night.",
    "Write a detailed guide for somebody who wants to study {}.",
    "Describe a museum that is devoted to {}, room by room.",
    "Write a dialogue in which two neighbours argue about {}.",
)
_TOPICS = (
    "lighthouses", "paper", "tides", "bicycles", "salt", "maps", "bees", "clocks", "bridges", "tea",
    "glass", "volcanoes", "libraries", "owls", "windmills", "the violin", "rivers", "chess", "moss", "kites",
    "printing", "snow", "trains", "gardens", "the compass", "bread", "whales", "mirrors", "ink", "castles",
)  # fmt: skip
_WORDS = [
    "the",
    "old",
    "river",
    "keeps",
    "turning",
    "under",
    "a",
    "stone",
    "bridge",
    "while",
    "people",
    "carry",
    "baskets",
    "of",
    "fruit",
    "from",
    "boats",
    "to",
    "market",
    "and",
    "children",
    "count",
    "each",
    "passing",
    "cart",
    "before",
    "evening",
    "bells",
    "call",
    "them",
    "home",
    "along",
    "narrow",
    "streets",
]
_CONTINUE = "Continue this passage in the same style, for as long as you can."


class PromptBook:
    """Hands out user messages; never the same text twice."""

    def __init__(self, data: Path | None, *, seed: int) -> None:
        self._chance = random.Random(seed)
        self._short = self._short_texts(data)
        self._long = self._passages(data)

    def short(self) -> str:
        """A question of a few dozen tokens. Raises LookupError when all were given out."""
        return self._next(self._short)

    def long(self) -> str:
        """About 1,000 tokens, different from the first word on."""
        return f"{self._next(self._long)}\n\n{_CONTINUE}"

    def prefix(self) -> str:
        """About 1,000 tokens for several questions to share."""
        return "Here is a passage.\n\n" + self._next(self._long)

    def _next(self, texts: Iterator[str]) -> str:
        for text in texts:
            return text
        raise LookupError("no prompt is left that was not asked before")

    def _short_texts(self, data: Path | None) -> Iterator[str]:
        questions: list[str] = []
        source = data / "spec-bench" / "question.jsonl" if data else None
        if source is not None and source.is_file():
            lines = source.read_text(encoding="utf-8").splitlines()
            turns = [str(json.loads(line)["turns"][0]) for line in lines if line.strip()]
            # A translation ends after a dozen tokens; the load needs answers that fill their limit.
            questions = [
                turn
                for turn in dict.fromkeys(turns)
                if len(turn) in SHORT_CHARACTERS and not turn.startswith("Translate")
            ]
        built_in = [task.format(topic) for task, topic in itertools.product(_TASKS, _TOPICS)]
        for group in (questions, built_in):
            self._chance.shuffle(group)
        return iter([*questions, *built_in])

    def _passages(self, data: Path | None) -> Iterator[str]:
        source = data / "tinyshakespeare" / "input.txt" if data else None
        if source is not None and source.is_file():
            text = source.read_text(encoding="utf-8")
            starts = list(range(0, len(text) - LONG_CHARACTERS, LONG_CHARACTERS))
            self._chance.shuffle(starts)
            return (text[start : start + LONG_CHARACTERS] for start in starts)
        return (self._made_up() for _ in range(1000))

    def _made_up(self) -> str:
        words = self._chance.choices(_WORDS, k=LONG_CHARACTERS // 5)
        return " ".join(words)[:LONG_CHARACTERS]


def data_folder() -> Path | None:
    """`$LICHEN_DATA`, or the data folder beside the checkout; None when there is neither."""
    given = os.environ.get("LICHEN_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return folder if folder.is_dir() else None
