"""Tool calls: what a caller declares, and how each family of models writes a call, one file a format.

A format is found by its marker in the model's own chat template; a template that knows nothing of tools
gets Hermes' format, described to the model in its system message.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT = "hermes"
LIST_BEGIN, LIST_BETWEEN, LIST_END = "[", ", ", "]"


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a call is written: `marker`, `before_name`, NAME, `before_arguments`, JSON, `tail`.

    listed: calls share one marker and stand in brackets, parted by commas; otherwise each has its marker.
    matches: whether a chat template (its source) teaches this format. new_id: makes the id of a call, in a
    form that the template takes back.
    """

    marker: str
    before_name: str
    before_arguments: str
    tail: str
    listed: bool = False
    matches: Callable[[str], bool]
    new_id: Callable[[], str] = _new_id

    def head(self, name: str) -> str:
        """What stands between the marker and the arguments."""
        return f"{self.before_name}{json.dumps(name, ensure_ascii=False)[1:-1]}{self.before_arguments}"

    def written(self, name: str, arguments: str) -> str:
        """A whole call, as the model would have written it."""
        call = f"{self.head(name)}{arguments}{self.tail}"
        return f"{self.marker}{LIST_BEGIN}{call}{LIST_END}" if self.listed else f"{self.marker}{call}"


@functools.cache
def formats() -> dict[str, ToolFormat]:
    """All formats by file name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FORMAT for name in names}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, or None."""
    return next((form for form in formats().values() if form.matches(template)), None)


def instructions(tools: Sequence[Tool], form: ToolFormat) -> str:
    """A system message that teaches tools to a model whose template does not."""
    listed = "\n".join(json.dumps(tool.plain(), ensure_ascii=False) for tool in tools)
    call = form.written("NAME", '{"ARGUMENT": "VALUE"}')
    return (
        f"You can call these functions, given with the JSON schema of their arguments:\n{listed}\n"
        f"To call one, write:\n{call}"
    )
