"""`<tool_call>` tags around a JSON object: Hermes, Qwen, and most models tuned for tools since."""

from __future__ import annotations

from lichen.runtime.tools import ToolFormat

FORMAT = ToolFormat(
    marker="<tool_call>",
    before_name='\n{"name": "',
    before_arguments='", "arguments": ',
    tail="}\n</tool_call>",
    matches=lambda template: "<tool_call>" in template,
)
