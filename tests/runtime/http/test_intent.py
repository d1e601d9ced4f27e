"""The intent of one request: what a body may say, and that it is answered."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from lichen.errors import LichenError
from lichen.runtime.http.schema import ChatBody, parse
from tests.conftest import RunningDaemon

MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'


def test_an_intent_reaches_the_options() -> None:
    body = parse(f'{{{MESSAGES}, "lichen": {{"intent": "latency"}}}}'.encode(), ChatBody)
    assert body.sampling().intent == "latency"
    assert body.sampling().speculation
    saving = parse(f'{{{MESSAGES}, "lichen": {{"intent": "battery"}}}}'.encode(), ChatBody)
    assert not saving.sampling().speculation, "wrong guesses cost work"
    plain = parse(f'{{{MESSAGES}, "lichen": {{}}}}'.encode(), ChatBody)
    assert plain.sampling().intent == "balanced"


@pytest.mark.parametrize(
    "held",
    ['"latency"', '{"intent": "speed"}', '{"intent": null}', '{"priority": 1}', '{"intent": [1]}', "[]"],
)
def test_anything_else_is_refused_by_name(held: str) -> None:
    with pytest.raises(LichenError) as caught:
        parse(f'{{{MESSAGES}, "lichen": {held}}}'.encode(), ChatBody)
    assert caught.value.status == 400
    assert "lichen" in str(caught.value.param)


def test_an_urgent_request_is_answered(daemon: RunningDaemon) -> None:
    body: dict[str, Any] = {"prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 3}
    for intent in ("latency", "battery"):
        answer = httpx.post(
            f"{daemon.base_url}/completions", json={**body, "lichen": {"intent": intent}}, timeout=30
        )
        assert answer.json()["choices"][0]["text"].startswith(" 5")
