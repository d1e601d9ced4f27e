"""What somebody wants of a machine: an intent in one word, and objectives in numbers.

Objectives are limits that a plan must keep; among the plans that keep them the intent chooses, and of two
intents the first has the say where plans are not nearly equal. Text such as "300ms", "2GB" or "0.99" is read
here, and whatever makes no sense is refused by name.
"""

from __future__ import annotations

import math
import re
from typing import Literal, get_args

import msgspec

from lichen.errors import ConfigError

Intent = Literal["latency", "throughput", "memory", "battery", "balanced"]
INTENTS: tuple[Intent, ...] = get_args(Intent)

LONGEST_S = 86_400.0
MOST_BYTES = 1 << 50
FASTEST = 1e9  # tokens a second

_TIME = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20,
          "GiB": 1 << 30, "TiB": 1 << 40}  # fmt: skip
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})")


class Objectives(msgspec.Struct, frozen=True, kw_only=True):
    """Limits; None is no limit. Raises ConfigError for what cannot be asked.

    ttft, itl: most seconds to the first token and between two. rate: least tokens a second of all users
    together. memory: most bytes of the process. quality: least share of the asked file's predictions that is
    kept, which is exp(-mean KL divergence): 0.99 is a divergence of 0.01.
    """

    ttft: float | None = None
    itl: float | None = None
    rate: float | None = None
    memory: int | None = None
    quality: float = 0.99

    def __post_init__(self) -> None:
        _limit("ttft", self.ttft, LONGEST_S, "s")
        _limit("itl", self.itl, LONGEST_S, "s")
        _limit("tokens-per-second", self.rate, FASTEST)
        _limit("memory", self.memory, MOST_BYTES, " bytes")
        if not 0 <= self.quality <= 1:
            raise ConfigError(f"--quality must lie between 0 and 1, not {self.quality}.")
        if self.ttft is not None and self.itl is not None and self.itl > self.ttft:
            raise ConfigError(
                f"--itl {self.itl:g}s is longer than --ttft {self.ttft:g}s, but a first token takes at least "
                "as long as any other.",
                hint="Give the longer time to --ttft.",
            )


def seconds(text: str, name: str) -> float:
    """A time such as '300ms' or '2s'; a bare number is seconds. Raises ConfigError that names the flag."""
    return _quantity(text, name, _TIME, 1.0, "a time such as 300ms or 2s")


def amount(text: str, name: str) -> int:
    """A number of bytes such as '2GB' or '512MiB'. Raises ConfigError that names the flag."""
    return int(_quantity(text, name, _BYTES, 1, "a size such as 2GB or 512MiB"))


def intents(text: str) -> tuple[Intent, ...]:
    """Intents by their words, the most important first: 'latency' or 'memory,latency'.

    Raises ConfigError with the words that there are.
    """
    found: list[Intent] = []
    for part in text.split(","):
        word = part.strip().lower()
        known = next((intent for intent in INTENTS if intent == word), None)
        if known is None:
            raise ConfigError(f"There is no intent {word[:40]!r}.", hint=f"Choose of {', '.join(INTENTS)}.")
        if known in found:
            raise ConfigError(f"The intent {known} is named twice.")
        found.append(known)
    return tuple(found)


def _quantity(
    text: str, name: str, units: dict[str, float] | dict[str, int], bare: float, form: str
) -> float:
    match = _QUANTITY.fullmatch(text.strip())
    unit = bare if match is None or not match[2] else units.get(match[2])
    if match is None or unit is None:
        raise ConfigError(f"--{name} must be {form}, not {text[:40]!r}.")
    return float(match[1]) * unit


def _limit(name: str, value: float | None, most: float, unit: str = "") -> None:
    if value is not None and not (math.isfinite(value) and 0 < value <= most):
        raise ConfigError(f"--{name} must be more than 0 and at most {most:,g}{unit}, not {value:,g}{unit}.")
