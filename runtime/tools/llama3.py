"""A bare JSON object with `name` and `parameters`: Llama 3.1 and later."""

from __future__ import annotations

from lichen.runtime.tools import ToolFormat

FORMAT = ToolFormat(
    marker='{"name": "',
    before_name="",
    before_arguments='", "parameters": ',
    tail="}",
    matches=lambda template: '"parameters": dictionary of argument' in template or "<|python_tag|>" in template,
)
