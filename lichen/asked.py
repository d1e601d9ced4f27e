"""What a program asks of the embedded API, as the engine's own options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lichen.errors import RequestError
from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.tools import Tool


def form_of(schema: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]], choice: str) -> AnswerForm:
    """Raises RequestError for tools in another shape than OpenAI's, or a choice that is none of them."""
    try:
        known = tuple(
            Tool(
                function["name"],
                function.get("description") or "",
                function.get("parameters") or {"type": "object", "properties": {}},
            )
            for function in (tool["function"] for tool in tools)
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise RequestError(
            "A tool must be {'type': 'function', 'function': {'name': …, 'parameters': …}}.", param="tools"
        ) from error
    named = choice not in ("auto", "none", "required")
    if named and choice not in {tool.name for tool in known}:
        raise RequestError(f"tool_choice names {choice!r}, which is not in tools.", param="tool_choice")
    return AnswerForm(tools=known, tool_choice=choice, named=named, schema=schema)


def sampling_of(options: dict[str, Any]) -> SamplingOptions:
    """The same options as over HTTP. Raises RequestError naming an unknown or mistyped one."""
    if isinstance(stop := options.get("stop"), str):
        options["stop"] = (stop,)
    unknown = options.keys() - set(SamplingOptions.__struct_fields__)
    if unknown:
        name = min(unknown)
        raise RequestError(
            f"There is no option {name!r}.",
            hint=f"Options: {', '.join(SamplingOptions.__struct_fields__)}.",
            param=name,
        )
    try:
        return msgspec.convert({k: v for k, v in options.items() if v is not None}, SamplingOptions)
    except msgspec.ValidationError as error:
        raise RequestError(f"{error}.") from error
