"""What an error may tell a client: no folder of this machine, no key, no secret part of an address."""

from __future__ import annotations

import re
from pathlib import Path

_USER_OF_URL = re.compile(r"(?<=://)[^\s/@]+@")
_QUERY_OF_URL = re.compile(r"(\bhttps?://[^\s?#'\"]+)[?#][^\s'\"]*")
_TOKEN = re.compile(r"\b(?:lk-|sk-|hf_|gh[a-z]_)[A-Za-z0-9_-]{8,}|(?<=\bBearer )\S+", re.IGNORECASE)
# The folders of an absolute path; the address of a web page keeps its own.
_FOLDERS = re.compile(r"(?:(?<=file:)|(?<![\w:/\\.~-]))(?:~|[A-Za-z]:)?[/\\]+(?:[^\s/\\'\",;:]+[/\\]+)+")


def without_secrets(text: str) -> str:
    """The text with folders, tokens, and user and query of addresses taken out; a file keeps its name."""
    text = _USER_OF_URL.sub("", text)
    text = _QUERY_OF_URL.sub(r"\1", text)
    text = _TOKEN.sub("(hidden)", text)
    home = str(Path.home())
    if len(home) > 1:  # a home folder may hold spaces, where the pattern below would stop
        text = text.replace(home, "~")
    return _FOLDERS.sub("", text)
