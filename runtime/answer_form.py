"""What form an answer must have, as a request asks for it: tools, a JSON schema, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from lichen.runtime.answer import Thinking
from lichen.runtime.grammar import json_grammar, tool_grammar, whole_grammar
from lichen.runtime.tools import Tool, ToolFormat

Schema = Mapping[str, Any] | bool | None


class AnswerForm(msgspec.Struct, frozen=True, kw_only=True):
    """tool_choice: "auto", "none", "required", or the name of the one tool to call (with `named`).

    schema: what the answer's JSON must satisfy. lenient: keywords that cannot be enforced are ignored.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    named: bool = False
    parallel: bool = True
    schema: Schema = None
    lenient: bool = False

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model may call."""
        if self.named:
            return tuple(tool for tool in self.tools if tool.name == self.tool_choice)
        return () if self.tool_choice == "none" else self.tools

    @property
    def only_calls(self) -> bool:
        """Whether the answer must call a tool, and may say nothing else."""
        return bool(self.offered) and (self.named or self.tool_choice == "required")

    @property
    def param(self) -> str:
        """The request's field that the grammar comes from."""
        return "tools" if self.offered else "response_format"

    def grammar(self, form: ToolFormat, thinking: Thinking, *, marks: Mapping[str, int]) -> str | None:
        """The whole grammar, or None where anything may be said.

        marks: the markers that are one token of the vocabulary.
        """
        if self.offered:
            answer = tool_grammar(
                self.offered,
                form,
                required=self.only_calls,
                parallel=self.parallel and not self.named,
                marks=marks,
                otherwise=self.schema,
            )
        elif self.schema is not None:
            answer = json_grammar(self.schema, lenient=self.lenient)
        else:
            return None
        return whole_grammar(answer, thinking=thinking, marks=marks)
