"""The axes of the crossing matrix: what may be combined in one request, and what happens around it.

A new feature gets a row in `AXES`: its values are the fields that it puts into the body. `shapes`: whether
the answer depends on it (then the plain path has it too); otherwise it must change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.conformance.covering import Combination

Fields = Mapping[str, Any]

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": NOTHING}},
]
ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 16},
        "pages": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["title", "pages"],
    "additionalProperties": False,
}
NAMED = {"type": "function", "function": {"name": "weather"}}


@dataclass(frozen=True)
class Axis:
    """value -> fields of the body."""

    values: Mapping[str, Fields]
    shapes: bool = False


AXES: dict[str, Axis] = {
    "stream": Axis({"no": {}, "yes": {"stream": True, "stream_options": {"include_usage": True}}}),
    "tools": Axis(
        {
            "none": {},
            "auto": {"tools": TOOLS, "tool_choice": "auto"},
            "required": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
            "named": {"tools": TOOLS, "tool_choice": NAMED},
        },
        shapes=True,
    ),
    "schema": Axis(
        {
            "none": {},
            "json_object": {"response_format": {"type": "json_object"}},
            "json_schema": {
                "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": ANSWER}}
            },
        },
        shapes=True,
    ),
    "adapter": Axis(
        {"none": {}, "a": {"model": "default:a"}, "b": {"model": "default:b"}},
        shapes=True,
    ),
    "n": Axis({"1": {}, "2": {"n": 2}, "3": {"n": 3}}),
    "stop": Axis(
        {"none": {}, "one": {"stop": " the"}, "many": {"stop": ["\n\n", " and", ". ", "never written"]}},
        shapes=True,
    ),
    "logprobs": Axis({"none": {}, "0": {"logprobs": True}, "5": {"logprobs": True, "top_logprobs": 5}}),
    "deterministic": Axis({"no": {}, "yes": {"deterministic": True}}),
    "speculation": Axis({"no": {"speculation": False}, "suffix": {}, "head": {}}),
    # What happens around the request; see test_crossing_matrix.py.
    "cancel": Axis({"no": {}, "early": {}, "late": {}}),
    "prefix": Axis({"cold": {}, "shared": {}}),
    "neighbour": Axis({"none": {}, "stream": {}, "prefill": {}}),
}

SHARED = "You write for a small magazine about rivers and boats, and you never use lists."
SHARED_TOKENS = 16  # at least; what a warm request must find in the cache
MAX_TOKENS = 28  # enough for a call or an object of these
FEW_TOKENS = 8  # where nothing has to come to its end
SUBJECTS = (
    "a lighthouse",
    "an old ferry",
    "two sisters",
    "a storm",
    "a lost map",
    "the harbour cat",
    "a bridge",
)


def messages(number: int, combination: Combination) -> list[dict[str, str]]:
    """The conversation: with a beginning that others share, or one that nobody had before.

    What comes from an empty cache anyway, or shares its beginning, is the same for each form of an answer, so
    that its plain answer is computed once.
    """
    form = sum(5**at * value for at, value in enumerate(_form(combination)))
    shared, alone = combination["prefix"] == "shared", combination["deterministic"] == "yes"
    unlike_all = form if alone else 7919 * (number + 1)
    system = SHARED if shared else f"Story number {unlike_all}."
    asked = f"Tell me a long story about {SUBJECTS[form % len(SUBJECTS)]}."
    return [{"role": "system", "content": system}, {"role": "user", "content": asked}]


def _form(combination: Combination) -> list[int]:
    """Which value of each axis that shapes the answer."""
    return [list(axis.values).index(combination[name]) for name, axis in AXES.items() if axis.shapes]


def offered(combination: Combination) -> list[dict[str, Any]]:
    """The tools that the prompt speaks of."""
    return {"none": [], "named": TOOLS[:1]}.get(combination["tools"], TOOLS)


def body(number: int, combination: Combination) -> dict[str, Any]:
    """The request as the combination says."""
    return _base(number, combination) | _fields(combination, plain=False)


def plain_body(number: int, combination: Combination) -> dict[str, Any]:
    """The same question on the plain path: greedy, alone, not streamed, from an empty cache."""
    fresh = {"deterministic": True, "logprobs": True, "top_logprobs": 20}
    return _base(number, combination) | _fields(combination, plain=True) | fresh


def _base(number: int, combination: Combination) -> dict[str, Any]:
    ends = combination["tools"] in ("required", "named") or combination["schema"] == "json_schema"
    return {
        "model": "default",
        "messages": messages(number, combination),
        "temperature": 0,
        "max_tokens": MAX_TOKENS if ends else FEW_TOKENS,
    }


def _fields(combination: Combination, *, plain: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in combination.items():
        axis = AXES[name]
        if axis.shapes or not plain:
            fields |= axis.values[value]
    return fields
