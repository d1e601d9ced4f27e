"""Grammars over the real vocabulary: what belongs to the language is allowed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.errors import RequestError
from lichen.runtime.answer import Thinking
from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.constraint import Grammars
from lichen.runtime.native import Model
from lichen.runtime.tools import Tool, ToolFormat, format_of, formats

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
PICK, DROP = Tool("pick", "Pick.", SCHEMA), Tool("drop", "Drop.", SCHEMA)
HERMES, LLAMA = formats()["hermes"], formats()["llama3"]
MISTRAL, MISTRAL_ARGS = formats()["mistral"], formats()["mistral_args"]
TWO_LISTED = '[TOOL_CALLS][{"name": "pick", "arguments": {"n": 7}}, {"name": "drop", "arguments": {"n": 8}}]'
CALL = HERMES.written("pick", '{"n": 7}')
DROPPED = HERMES.written("drop", '{"n": 7}')


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[Model]:
    model = Model(model_path)
    yield model
    model.close()


@pytest.fixture(scope="module")
def grammars(model: Model) -> Grammars:
    return Grammars(model)


def accepts(
    model: Model,
    grammars: Grammars,
    form: AnswerForm,
    text: str,
    thinking: Thinking = None,
    tools: ToolFormat = HERMES,
) -> bool:
    """Whether the whole text, and an end behind it, is allowed."""
    written = form.grammar(tools, thinking, marks={})
    assert written is not None
    constraint = grammars.constraint(written, param="x")
    for token in model.tokenize(text, special=False, add_bos=False):
        logits = np.zeros(model.vocab_size, dtype=np.float32)
        constraint.mask(logits)
        if not np.isfinite(logits[token]):
            return False
        constraint.accept(token)
        assert constraint.failure is None
    if constraint.complete:
        return True
    logits = np.zeros(model.vocab_size, dtype=np.float32)
    constraint.mask(logits)
    return bool(np.isfinite(logits[model.eos]))


@pytest.mark.parametrize(
    ("text", "allowed"),
    [('{"n": 7}', True), ('{"n": 70}', True), ('{"n": 0}', False), ('{"n": 7', False), ('{"m": 7}', False),
     ('{"n":7}', False), (' {"n": 7}', False), ('{"n": 7} ', False), ("", False)],
)  # fmt: skip
def test_a_schema_and_nothing_else(model: Model, grammars: Grammars, text: str, allowed: bool) -> None:
    assert accepts(model, grammars, AnswerForm(schema=SCHEMA), text) == allowed


@pytest.mark.parametrize(
    ("thinking", "text", "allowed"),
    [
        ("open", 'So {"n": 1}?</think>\n\n{"n": 7}', True),
        ("open", '{"n": 7}', False),
        ("open", "Hm.</think>Seven", False),
        ("maybe", '{"n": 7}', True),
        ("maybe", '<think>Well < so.</think>{"n": 7}', True),
        ("maybe", "<think>Well.</think>Seven", False),
        ("maybe", "Seven", False),
    ],
)
def test_a_schema_binds_only_behind_the_thinking(
    model: Model, grammars: Grammars, thinking: Thinking, text: str, allowed: bool
) -> None:
    assert accepts(model, grammars, AnswerForm(schema=SCHEMA), text, thinking) == allowed


@pytest.mark.parametrize(
    ("options", "text", "allowed"),
    [
        ({}, "Hello <b>there</b>.", True),
        ({}, f"Wait. {CALL}", True),
        ({}, f"{CALL}\n{CALL}", True),
        ({"parallel": False}, f"{CALL}\n{CALL}", False),
        ({}, HERMES.written("steal", "{}"), False),
        ({}, HERMES.written("pick", '{"n": 0}'), False),
        ({"tool_choice": "required"}, CALL, True),
        ({"tool_choice": "required"}, "Hello.", False),
        ({"tool_choice": "required"}, f"{CALL}\n{DROPPED}", True),
        ({"tool_choice": "required", "parallel": False}, f"{CALL}\n{CALL}", False),
        ({"tool_choice": "drop", "named": True}, CALL, False),
        ({"tool_choice": "drop", "named": True}, DROPPED, True),
        ({"schema": SCHEMA}, '{"n": 7}', True),
        ({"schema": SCHEMA}, CALL, True),
        ({"schema": SCHEMA}, "Hello.", False),
    ],
)
def test_tools_by_choice(
    model: Model, grammars: Grammars, options: dict[str, Any], text: str, allowed: bool
) -> None:
    assert accepts(model, grammars, AnswerForm(tools=(PICK, DROP), **options), text) == allowed


@pytest.mark.parametrize(
    ("options", "text", "allowed"),
    [
        ({}, "Hello [there].", True),
        ({}, MISTRAL.written("pick", '{"n": 7}'), True),
        ({}, MISTRAL.written("pick", '{"n": 0}'), False),
        ({}, '[TOOL_CALLS] [{"name": "pick", "arguments": {"n": 7}}]', True),
        ({}, f"Wait.{TWO_LISTED}", True),
        ({"parallel": False}, TWO_LISTED, False),
        ({"tool_choice": "required"}, TWO_LISTED, True),
        ({"tool_choice": "required"}, TWO_LISTED[:-1], False),
        ({"tool_choice": "required", "parallel": False}, MISTRAL.written("drop", '{"n": 7}'), True),
        ({"schema": SCHEMA}, MISTRAL.written("drop", '{"n": 7}'), True),
        ({"schema": SCHEMA}, "Hello.", False),
    ],
)
def test_calls_in_a_list(
    model: Model, grammars: Grammars, options: dict[str, Any], text: str, allowed: bool
) -> None:
    assert accepts(model, grammars, AnswerForm(tools=(PICK, DROP), **options), text, tools=MISTRAL) == allowed


def test_a_name_and_its_arguments(model: Model, grammars: Grammars) -> None:
    form = AnswerForm(tools=(PICK, DROP), tool_choice="required")
    call = MISTRAL_ARGS.written("pick", '{"n": 7}')
    assert accepts(model, grammars, form, call + call, tools=MISTRAL_ARGS)
    assert not accepts(model, grammars, form, call[:-1], tools=MISTRAL_ARGS)


def test_a_marker_that_is_one_token_is_asked_for_as_one(model: Model, grammars: Grammars) -> None:
    form = AnswerForm(tools=(PICK,), tool_choice="required")
    written = form.grammar(MISTRAL, None, marks={MISTRAL.marker: model.eos})
    assert written is not None
    logits = np.zeros(model.vocab_size, dtype=np.float32)
    grammars.constraint(written, param="x").mask(logits)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [model.eos]


def test_none_binds_nothing() -> None:
    assert AnswerForm(tools=(PICK,), tool_choice="none").grammar(HERMES, None, marks={}) is None
    assert AnswerForm().grammar(HERMES, "open", marks={}) is None


def test_a_format_is_found_by_its_marker() -> None:
    assert format_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert format_of("<|python_tag|>") is LLAMA
    assert format_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert format_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is MISTRAL_ARGS
    assert format_of("{{ messages }}") is None


def test_a_compiled_grammar_is_used_again_and_a_bad_one_is_named(grammars: Grammars) -> None:
    written = AnswerForm(schema={"type": "boolean"}).grammar(HERMES, None, marks={})
    assert written is not None
    one, two = (grammars.constraint(written, param="x") for _ in range(2))
    assert one is not two
    with pytest.raises(RequestError, match="response_format cannot be enforced"):
        grammars.constraint("start: (", param="response_format")
    with pytest.raises(RequestError, match="characters"):
        grammars.constraint("x" * (1 << 21), param="response_format")
