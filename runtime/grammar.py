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
from lichen.runtime.tools import LIST_BEGIN, LIST_BETWEEN, LIST_END, Tool, ToolFormat

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
    marks: Mapping[str, int],
    otherwise: Mapping[str, Any] | bool | None,
) -> str:
    """Lark rules whose `answer` calls these tools.

    required: at least one call, and nothing but calls. parallel: more than one call may follow.
    otherwise: the JSON schema of an answer without a call; None: any text. marks: the markers that are one
    token of the vocabulary.
    """
    marker = _marker(form.marker, marks)
    rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}\n"]
    for number, tool in enumerate(tools):
        head = _texts(form.before_name, json.dumps(tool.name, ensure_ascii=False)[1:-1])
        arguments = (
            f"{_marker(form.before_arguments, marks)} {_json(tool.parameters, lenient=not tool.strict)}"
        )
        rules.append(f"call_{number}: {head} {arguments} {_texts(form.tail)}\n")
    calls, more = "call", f'("\\n"? {marker} call)*'
    if form.listed:
        calls, more = f'" "? {_texts(LIST_BEGIN)} list', ""
        rules.append(
            f"list: call{f' ({_texts(LIST_BETWEEN)} call)*' if parallel else ''} {_texts(LIST_END)}\n"
        )
    if required:
        return f"answer: {marker} {calls}{more if parallel else ''}\n{''.join(rules)}"
    if otherwise is not None:
        whole = f"{marker} {calls}{more if parallel else ''}"
        return f"answer: {whole} | {_json(otherwise, lenient=False)}\n{''.join(rules)}"
    opening = "opening" if form.marker in marks else "opening[lazy]"
    start = f"(opening {calls})* TEXT" if parallel and not form.listed else f"opening {calls} | TEXT"
    return f"answer: {start}\n{opening}: TEXT {marker}\nTEXT: /(.|\\n)*/\n{''.join(rules)}"


def whole_grammar(answer: str, *, thinking: Thinking = None, marks: Mapping[str, int]) -> str:
    """A complete grammar around the rule `answer`.

    thinking: free text up to its closing marker goes before ("open"), or may ("maybe"): what a model
    thinks is not bound.
    """
    head = "%llguidance {}\n"
    if thinking is None:
        return f"{head}start: answer\n{answer}"
    lazy = "" if THINK_END in marks else "[lazy]"
    rules = f"thought{lazy}: THOUGHT {_marker(THINK_END, marks)}\nTHOUGHT: /(.|\\n)*/\n"
    gap = "/[ \\t\\n]*/"
    if thinking == "open":
        return f"{head}start: thought {gap} answer\n{rules}{answer}"
    return f"{head}start: {gap} ({_marker(THINK_BEGIN, marks)} thought {gap})? answer\n{rules}{answer}"


def _marker(text: str, marks: Mapping[str, int]) -> str:
    """A marker as one token where the vocabulary has it, else as its letters."""
    return f"<[{marks[text]}]>" if text in marks else _texts(text)


def _texts(*texts: str) -> str:
    """Literal text; nothing for the empty one, which the dialect does not know."""
    whole = "".join(texts)
    return json.dumps(whole) if whole else ""


def _json(schema: Mapping[str, Any] | bool, *, lenient: bool) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options = {**_LAYOUT, **({"lenient": True} if lenient else {})}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=True)
