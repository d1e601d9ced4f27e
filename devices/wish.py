"""A wish in words: what is wanted of a machine and what comes in, as one line such as

    ttft=300ms, itl=40ms, memory=2GB, users=8, prompt=500

The names are those of the flags of `lichen plan`. What is not said keeps its default.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lichen.devices.intent import Intent, Objectives, amount, intents, seconds
from lichen.devices.load import Load
from lichen.errors import ConfigError

LONGEST = 1024  # characters
MOST_DIGITS = 18

Read = Callable[[str, str], Any]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """Intents, the most important first; limits; and the load that they are meant for."""

    intents: tuple[Intent, ...] = ("balanced",)
    objectives: Objectives = Objectives()
    load: Load = Load()


def wish(intent: str | None, parts: Mapping[str, str]) -> Wish:
    """A wish from its words, by name. Raises ConfigError that names what makes no sense."""
    read: dict[str, dict[str, Any]] = {"objectives": {}, "load": {}}
    for name, text in parts.items():
        if name not in _PARTS:
            near = difflib.get_close_matches(name, _PARTS, n=1)
            raise ConfigError(
                f"There is no objective {name[:40]!r}.",
                hint=f"Did you mean {near[0]}?" if near else f"There are: {', '.join(_PARTS)}.",
            )
        kind, field, how = _PARTS[name]
        read[kind][field] = how(text, name)
    return Wish(
        intents=intents(intent) if intent is not None else Wish().intents,
        objectives=Objectives(**read["objectives"]),
        load=Load(**read["load"]),
    )


def parts_of(line: str) -> dict[str, str]:
    """The parts of a line such as 'ttft=300ms, users=8'. Raises ConfigError."""
    if len(line) > LONGEST:
        raise ConfigError(f"The objectives have more than {LONGEST} characters.")
    found: dict[str, str] = {}
    for part in line.replace(",", " ").split():
        name, equals, text = part.partition("=")
        if not equals or not text:
            raise ConfigError(
                f"The objectives hold {part[:40]!r}, which is no name=value.",
                hint="For example: ttft=300ms, users=8",
            )
        if name in found:
            raise ConfigError(f"The objective {name[:40]} is given twice.")
        found[name] = text
    return found


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--{name} must be a number, not {text[:40]!r}.")
    return value


def _whole(text: str, name: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= MOST_DIGITS):
        raise ConfigError(f"--{name} must be a whole number, not {text[:40]!r}.")
    return int(text)


def _yes(text: str, name: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ConfigError(f"--{name} must be yes or no, not {text[:40]!r}.")
    return text.lower() in ("yes", "true")


_PARTS: dict[str, tuple[str, str, Read]] = {
    "ttft": ("objectives", "ttft", seconds),
    "itl": ("objectives", "itl", seconds),
    "tokens-per-second": ("objectives", "rate", _number),
    "memory": ("objectives", "memory", amount),
    "quality": ("objectives", "quality", _number),
    "users": ("load", "users", _whole),
    "pause": ("load", "pause", seconds),
    "arrivals": ("load", "arrivals", _number),
    "prompt": ("load", "prompt", _whole),
    "answer": ("load", "answer", _whole),
    "shared": ("load", "shared", _whole),
    "repeats": ("load", "repeats", _number),
    "together": ("load", "together", _yes),
}
