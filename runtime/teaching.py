"""Lessons as token ids, as the model meets them when it is served.

The question is exactly what serving would send; the answer is what the model would then have to write, up
to and with the token that ends it. A conversation with several answers becomes one example for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lichen.adapters import general
from lichen.adapters.lesson_forms import Lesson
from lichen.adapters.lessons import read_lessons
from lichen.adapters.task import Example, Examples
from lichen.errors import LessonError, RequestError
from lichen.quant.gguf_check import check_gguf
from lichen.runtime.native import Model
from lichen.runtime.prompt import PromptWriter
from lichen.runtime.tools import Tool


@dataclass
class Written:
    """Examples, and the lessons that gave none: too long for `limit` tokens, or refused by the template
    (with the first reason)."""

    examples: list[Example] = field(default_factory=list)
    too_long: int = 0
    refused: int = 0
    reason: str = ""


class Teacher:
    """Writes lessons for one model. limit: tokens of an example."""

    def __init__(self, model: Model, limit: int) -> None:
        self._model, self._limit = model, limit
        self._writer = PromptWriter(model)

    def write(self, lessons: Iterable[Lesson]) -> Written:
        """All of them, in order."""
        written = Written()
        for lesson in lessons:
            try:
                examples = self.examples(lesson)
            except RequestError as error:
                written.refused += 1
                written.reason = written.reason or error.message
                continue
            for example in examples:
                if len(example.prompt) + max(len(example.answer), len(example.rejected)) > self._limit:
                    written.too_long += 1
                else:
                    written.examples.append(example)
        return written

    def examples(self, lesson: Lesson) -> list[Example]:
        """One for each answer that is taught. Raises RequestError when the template refuses it."""
        tools = [_tool(raw) for raw in lesson.tools]
        if lesson.kind == "completion":
            return [self._completion(lesson.prompt, lesson.completion)]
        if lesson.kind == "preference":
            prompt, answer = self._answer(lesson.messages, lesson.preferred[0], tools)
            return [Example(prompt, answer, self._answer(lesson.messages, lesson.rejected[0], tools)[1])]
        taught = []
        for index, message in enumerate(lesson.messages):
            if message["role"] == "assistant" and message.get("weight") != 0:
                taught.append(Example(*self._answer(lesson.messages[:index], message, tools)))
        return taught

    def _answer(
        self, before: Sequence[Mapping[str, Any]], answer: Mapping[str, Any], tools: Sequence[Tool]
    ) -> tuple[list[int], list[int]]:
        """Token ids of the question as it is served, and of the answer with its end."""
        asked = [_plain(message) for message in before]
        question = self._writer.text(asked, tools)
        whole = self._writer.text([*asked, _plain(answer)], tools, asking=False)
        if not whole.startswith(question):
            raise RequestError(
                "The model's chat template writes an answer elsewhere than where it asks for one."
            )
        prompt, tokens = self._writer.tokens(question), self._writer.tokens(whole)
        if tokens[: len(prompt)] != prompt:  # a token goes over the border, but serving cuts there
            tokens = prompt + self._model.tokenize(whole[len(question) :], special=True, add_bos=False)
        return prompt, self._ended(tokens[len(prompt) :])

    def _completion(self, prompt: str, completion: str) -> Example:
        asked = self._model.tokenize(prompt, special=True, add_bos=True)
        whole = self._model.tokenize(prompt + completion, special=True, add_bos=True)
        if whole[: len(asked)] != asked:
            whole = asked + self._model.tokenize(completion, special=True, add_bos=False)
        if not asked:  # a model without a first token, and nothing to continue
            asked = [self._model.eos]
            whole = asked + whole
        return Example(asked, self._ended(whole[len(asked) :]))

    def _ended(self, tokens: list[int]) -> list[int]:
        """Up to the token that ends an answer, which is added where there is none."""
        for index, token in enumerate(tokens):
            if self._model.is_end(token):
                return tokens[: index + 1]
        return [*tokens, self._model.eos]


def examples_of(
    lessons: Path, model: Path, limit: int, *, validation: Path | None = None
) -> tuple[Examples, list[str]]:
    """A file of lessons as token ids for a model, and sentences about what had to be left out. Blocks.

    limit: tokens of an example. validation: a file that measures; without it a part of the lessons does.
    Raises LessonError when none is left to learn from, and what `check_gguf` does.
    """
    check_gguf(model)
    native = Model(model)
    try:
        teacher = Teacher(native, min(limit, native.context_train or limit))
        train = teacher.write(read_lessons(lessons, "train" if validation is None else None))
        held_out = teacher.write(
            read_lessons(lessons, "held_out") if validation is None else read_lessons(validation)
        )
        asked = [example.prompt for example in teacher.write(general.questions()).examples]
        ends = [token for token in range(native.vocab_size) if native.is_end(token)]
    finally:
        native.close()
    told = []
    if too_long := train.too_long + held_out.too_long:
        told.append(f"{too_long:,} examples are longer than {limit:,} tokens and left out.")
    if refused := train.refused + held_out.refused:
        told.append(f"{refused:,} lessons are left out: {train.reason or held_out.reason}")
    if not train.examples:
        raise LessonError("No lesson of the file is left to learn from.", param="file")
    return Examples(train=train.examples, held_out=held_out.examples, asked=asked, ends=ends), told


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "weight"}


def _tool(raw: Mapping[str, Any]) -> Tool:
    """A declared tool in OpenAI's shape."""
    function = raw.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("A tool of the lesson has no function with a name.")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(function["name"], str(function.get("description") or ""), parameters)
