"""Grammars in llguidance's Lark dialect: a JSON schema, tool calls, and either of them after thinking.

JSON is written on one line with one space after `,` and `:`. A small model that may write any white space
writes it for ever; with this form only the values are its choice.
Pure text in, text out; `constraint.py` compiles it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lichen.runtime.answer import THINK_BEGIN, THINK_END, Thinking
from lichen.runtime.tools import Tool, ToolFormat

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: Mapping[str, Any] | bool, *, lenient: bool = False) -> str:
    """Lark rules whose `answer` is one JSON value that the schema allows.

    lenient: ignore keywords that the library does not know, instead of refusing the schema.
    """
    return f"answer: {_json(schema, lenient=lenient)}\n"


def tool_grammar(
    tools: Sequence[Tool],
    form: ToolFormat,
    *,
    required: bool,
    parallel: bool,
    marker_is_token: bool,
    otherwise: Mapping[str, Any] | bool | None,
) -> str:
    """Lark rules whose `answer` calls these tools.

    required: at least one call, and nothing but calls. parallel: more than one call may follow.
    otherwise: the JSON schema of an answer without a call; None: any text.
    """
    marker = form.marker if marker_is_token else json.dumps(form.marker)
    rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}\n"]
    for number, tool in enumerate(tools):
        arguments = _json(tool.parameters, lenient=not tool.strict)
        rules.append(
            f"call_{number}: {json.dumps(form.head(tool.name))} {arguments} {json.dumps(form.tail)}\n"
        )
    calls = f'{marker} call ("\\n"? {marker} call)*' if parallel else f"{marker} call"
    if required:
        return f"answer: {calls}\n{''.join(rules)}"
    if otherwise is not None:
        return f"answer: {calls} | {_json(otherwise, lenient=False)}\n{''.join(rules)}"
    opening = "opening" if marker_is_token else "opening[lazy]"
    start = "(opening call)* TEXT" if parallel else "opening call | TEXT"
    return f"answer: {start}\n{opening}: TEXT {marker}\nTEXT: /(.|\\n)*/\n{''.join(rules)}"


def whole_grammar(
    answer: str, *, thinking: Thinking = None, begin_is_token: bool = False, end_is_token: bool = False
) -> str:
    """A complete grammar around the rule `answer`.

    thinking: free text up to its closing marker goes before ("open"), or may ("maybe"): what a model
    thinks is not bound.
    """
    head = "%llguidance {}\n"
    if thinking is None:
        return f"{head}start: answer\n{answer}"
    end = THINK_END if end_is_token else json.dumps(THINK_END)
    lazy = "" if end_is_token else "[lazy]"
    rules = f"thought{lazy}: THOUGHT {end}\nTHOUGHT: /(.|\\n)*/\n"
    gap = "/[ \\t\\n]*/"
    if thinking == "open":
        return f"{head}start: thought {gap} answer\n{rules}{answer}"
    begin = THINK_BEGIN if begin_is_token else json.dumps(THINK_BEGIN)
    return f"{head}start: {gap} ({begin} thought {gap})? answer\n{rules}{answer}"


def _json(schema: Mapping[str, Any] | bool, *, lenient: bool) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options = {**_LAYOUT, **({"lenient": True} if lenient else {})}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=True)
