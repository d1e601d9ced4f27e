"""Wishes in words: good, malformed and hostile ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.devices.intent import INTENTS, Objectives, amount, intents, seconds
from lichen.devices.load import Load
from lichen.devices.wish import Wish, parts_of, wish
from lichen.errors import ConfigError


def test_a_wish_is_read_from_its_words() -> None:
    line = "ttft=300ms, itl=40ms, users=8 memory=2GB,quality=0.99,tokens-per-second=50 prompt=500 answer=64"
    found = wish("memory,latency", parts_of(line))
    assert found.intents == ("memory", "latency")
    assert found.objectives == Objectives(ttft=0.3, itl=0.04, rate=50, memory=2 * 10**9, quality=0.99)
    assert found.load == Load(users=8, prompt=500, answer=64)
    assert wish(None, {}) == Wish()
    assert wish("battery", {"arrivals": "0.5", "pause": "0"}).load.arrivals == 0.5


@pytest.mark.parametrize(("text", "value"), [("300ms", 0.3), (" 2 s ", 2), ("1.5", 1.5), ("2min", 120)])
def test_times_are_read(text: str, value: float) -> None:
    assert seconds(text, "ttft") == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("2GB", 2e9), ("512MiB", 512 << 20), ("1.5 kB", 1500), ("7", 7)])
def test_sizes_are_read(text: str, value: float) -> None:
    assert amount(text, "memory") == value


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"ttft": "-300ms"}, "--ttft"),
        ({"ttft": "0"}, "--ttft"),
        ({"ttft": "nan"}, "--ttft"),
        ({"ttft": "inf"}, "--ttft"),
        ({"ttft": "25h"}, "--ttft"),
        ({"ttft": "90000s"}, "--ttft"),
        ({"itl": "40 parsecs"}, "--itl"),
        ({"ttft": "10ms", "itl": "20ms"}, "--itl"),
        ({"memory": "1" + "0" * 30 + "GB"}, "--memory"),
        ({"memory": "999999TB"}, "--memory"),
        ({"memory": "-2GB"}, "--memory"),
        ({"memory": ""}, "--memory"),
        ({"quality": "1.01"}, "--quality"),
        ({"quality": "nan"}, "--quality"),
        ({"tokens-per-second": "-1"}, "--tokens-per-second"),
        ({"tokens-per-second": "1e300"}, "--tokens-per-second"),
        ({"users": "0"}, "--users"),
        ({"users": "-1"}, "--users"),
        ({"users": "2.5"}, "--users"),
        ({"users": "9" * 5000}, "--users"),
        ({"users": "\uff11"}, "--users"),
        ({"prompt": "0"}, "--prompt"),
        ({"prompt": "10", "shared": "11"}, "--shared"),
        ({"arrivals": "0"}, "--arrivals"),
        ({"arrivals": "1", "together": "yes"}, "--together"),
        ({"together": "perhaps"}, "--together"),
        ({"repeats": "1"}, "--repeats"),
        ({"user": "2"}, "users"),
    ],
)
def test_nonsense_is_refused_by_name(parts: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        wish(None, parts)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("line", ["ttft", "ttft=", "ttft=1 ttft=2", "=3", "a" * 2000])
def test_a_line_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ConfigError):
        wish(None, parts_of(line))


@pytest.mark.parametrize("text", ["", "speed", "latency,", "latency,latency", "latency;memory", "x" * 9000])
def test_an_unknown_intent_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match="intent"):
        intents(text)
    assert intents(" Latency ,battery") == ("latency", "battery")
    assert [intents(word) for word in INTENTS] == [(word,) for word in INTENTS]


@given(st.text(max_size=60))
def test_any_text_gives_a_wish_or_one_sentence(line: str) -> None:
    try:
        found = wish(None, parts_of(line))
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(found, Wish)


@given(st.floats(min_value=1e-6, max_value=8e4))
def test_a_time_is_read_as_written(value: float) -> None:
    assert math.isclose(seconds(f"{value:.9f}", "ttft"), value, abs_tol=1e-9)
