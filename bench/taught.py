"""Lessons from public data for the measurements of learning: banking77, GSM8K, and Spec-Bench's questions.

They lie in `$LICHEN_DATA` or `../shared/data`. A customer's question becomes "which intent is this?", and the
answer that a user would have put in place of the model's is the intent's name.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Collection, Iterable
from pathlib import Path

from bench.prompts import data_folder
from lichen.adapters import general
from lichen.adapters.lesson_forms import Lesson
from lichen.adapters.task import Example
from lichen.errors import NotFound
from lichen.runtime.native import Model
from lichen.runtime.teaching import Teacher

LONGEST = 400  # tokens of an example
LONGEST_QUESTION = (
    500  # characters of a general question: most of Spec-Bench's summaries and passages are longer
)


class Schoolbook:
    """Writes lessons as tokens of one model. Raises NotFound where the data is not there."""

    def __init__(self, model: Path) -> None:
        folder = data_folder()
        if folder is None:
            raise NotFound("The data of the measurements is not there.", hint="Set LICHEN_DATA.")
        self._folder, self._native = folder, Model(model)
        self._teacher = Teacher(self._native, LONGEST)

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        return [token for token in range(self._native.vocab_size) if self._native.is_end(token)]

    def intents(self) -> list[str]:
        """Names of all intents, in the order of the alphabet."""
        return sorted({intent for _, intent in self._rows("train")})

    def banking(self, split: str, *, intents: Collection[str] | None = None, seed: int = 0) -> list[Example]:
        """Questions of some intents (None: of all), shuffled. split: train or test."""
        rows = [row for row in self._rows(split) if intents is None or row[1] in intents]
        random.Random(seed).shuffle(rows)
        return self._written((f"Which intent is this?\n{text}", intent) for text, intent in rows)

    def sums(self, split: str, *, seed: int = 0) -> list[Example]:
        """Problems of GSM8K with their worked answers, shuffled."""
        lines = (self._folder / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        random.Random(seed).shuffle(rows)
        return self._written((row["question"], row["answer"]) for row in rows)

    def final_numbers(self, split: str) -> list[Example]:
        """The same problems with their worked steps given, so that only the final number is the answer."""
        found = []
        for example in self.sums(split):
            text = b"".join(self._native.piece(token) for token in example.answer[:-1]).decode()
            text = text.partition("####")[2]
            digits = len(self._native.tokenize(text.strip(), special=False, add_bos=False)) + 1  # and the end
            found.append(Example([*example.prompt, *example.answer[:-digits]], example.answer[-digits:]))
        return found

    def questions(self, count: int, *, seed: int = 0) -> list[list[int]]:
        """Questions of Spec-Bench, none of which is ever replayed, as prompts."""
        lines = (self._folder / "spec-bench" / "question.jsonl").read_text(encoding="utf-8").splitlines()
        turns = [str(json.loads(line)["turns"][0]) for line in lines]
        short = [turn for turn in turns if len(turn) <= LONGEST_QUESTION]
        random.Random(seed).shuffle(short)
        return [example.prompt for example in self._written((turn, ".") for turn in short[:count])]

    def asked(self) -> list[list[int]]:
        """The built-in general prompts, which are replayed."""
        return [example.prompt for example in self._teacher.write(general.questions()).examples]

    def close(self) -> None:
        """Let the model go."""
        self._native.close()

    def _rows(self, split: str) -> list[tuple[str, str]]:
        with (self._folder / "banking77" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            return [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]

    def _written(self, pairs: Iterable[tuple[str, str]]) -> list[Example]:
        return self._teacher.write(_lesson(question, answer) for question, answer in pairs).examples


def _lesson(question: str, answer: str) -> Lesson:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Lesson(kind="chat", messages=messages)
