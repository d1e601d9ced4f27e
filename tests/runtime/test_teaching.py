"""Lessons become the tokens that serving would send and that the model would have to answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.adapters.lesson_forms import lesson_of
from lichen.runtime.native import Model
from lichen.runtime.served_model import ServedModel
from lichen.runtime.teaching import Teacher

CHAT = b"""{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
 {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]}"""


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[Model]:
    """The default model's vocabulary and template."""
    loaded = Model(model_path)
    yield loaded
    loaded.close()


def shown(model: Model, tokens: list[int]) -> str:
    """Tokens as a template writes them."""
    return b"".join(model.marked_piece(token) for token in tokens).decode()


def test_a_question_is_what_serving_sends(model: Model, served: ServedModel) -> None:
    lesson = lesson_of(CHAT)
    first, second = Teacher(model, 512).examples(lesson)
    assert first.prompt == served.chat_tokens(lesson.messages[:1])
    assert second.prompt == served.chat_tokens(lesson.messages[:3])
    assert shown(model, first.answer) == "Hello.<|im_end|>"
    assert shown(model, second.answer) == "See you.<|im_end|>"


def test_an_answer_of_weight_0_is_not_taught(model: Model) -> None:
    line = CHAT.replace(b'"content": "Hello."', b'"content": "Hello.", "weight": 0')
    (only,) = Teacher(model, 512).examples(lesson_of(line))
    assert shown(model, only.answer) == "See you.<|im_end|>" and "Hello." in shown(model, only.prompt)


def test_completions_and_preferences(model: Model) -> None:
    teacher = Teacher(model, 512)
    (plain,) = teacher.examples(lesson_of(b'{"prompt": "One, two,", "completion": " three"}'))
    assert shown(model, plain.prompt) == "One, two," and shown(model, plain.answer) == " three<|im_end|>"
    (empty,) = teacher.examples(lesson_of(b'{"prompt": "", "completion": "Once"}'))
    assert empty.prompt and shown(model, empty.answer).startswith("Once")
    pair = b"""{"input": {"messages": [{"role": "user", "content": "Hi"}]},
     "preferred_output": [{"role": "assistant", "content": "Hello."}],
     "non_preferred_output": [{"role": "assistant", "content": "What?"}]}"""
    (both,) = teacher.examples(lesson_of(pair))
    assert shown(model, both.rejected) == "What?<|im_end|>"
    assert both.prompt == teacher.examples(lesson_of(CHAT))[0].prompt


def test_too_long_and_refused_lessons_are_counted(model: Model) -> None:
    odd = b"""{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
     "tools": [{"type": "function"}]}"""
    written = Teacher(model, 40).write([lesson_of(CHAT), lesson_of(odd)])
    assert (len(written.examples), written.too_long, written.refused) == (1, 1, 1)
    assert "no function with a name" in written.reason
