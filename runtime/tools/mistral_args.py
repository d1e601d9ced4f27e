"""`[TOOL_CALLS]`, a name, `[ARGS]` and its arguments: Mistral's models since its tokenizer of version 11."""

from __future__ import annotations

from lichen.runtime.tools import ToolFormat
from lichen.runtime.tools.mistral import new_id

FORMAT = ToolFormat(
    marker="[TOOL_CALLS]",
    before_name="",
    before_arguments="[ARGS]",
    tail="",
    matches=lambda template: "[TOOL_CALLS]" in template and "[ARGS]" in template,
    new_id=new_id,
)
