"""`[TOOL_CALLS]` before a JSON list of calls: Mistral's models up to its tokenizer of version 7."""

from __future__ import annotations

import secrets
import string

from lichen.runtime.tools import ToolFormat

ID_LETTERS = 9  # their templates refuse any other id


def new_id() -> str:
    """An id of nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LETTERS))


FORMAT = ToolFormat(
    marker="[TOOL_CALLS]",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    tail="}",
    listed=True,
    matches=lambda template: "[TOOL_CALLS]" in template and "[ARGS]" not in template,
    new_id=new_id,
)
