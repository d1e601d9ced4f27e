"""`lichen chat --show-drafts`: what had been guessed is green on a terminal, and counted."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import Mock

import pytest

from lichen.cli.answer import coloured
from lichen.cli.answering import DaemonAnswering
from lichen.errors import Unavailable


def event(text: str, **more: Any) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": None}], **more})


def test_an_event_says_whether_its_token_was_guessed() -> None:
    who = DaemonAnswering(Mock(), "daemon", None)
    for given, drafted in (({"lichen": {"drafted": True}}, True), ({}, False), ({"lichen": {}}, False)):
        assert who._read_event(event("x", **given)) == ["x"]
        assert who.drafted is drafted
    with pytest.raises(Unavailable):
        who._read_event(event("x", lichen="drafted"))


def test_only_a_terminal_gets_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coloured("x", True) == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert (coloured("x", True), coloured("x", False)) == ("\x1b[32mx\x1b[0m", "x")
