"""What comes in: how many people ask, how often, and how long their prompts and answers are."""

from __future__ import annotations

import math

import msgspec

from lichen.errors import ConfigError

MOST_USERS = 4096
MOST_TOKENS = 1 << 20
MOST_A_SECOND = 1e4
LONGEST_PAUSE_S = 86_400.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests to expect. Raises ConfigError for a load that cannot be.

    users: people of whom each asks again when the answer is complete, `pause` seconds later (a closed loop).
    arrivals: requests a second that come whether others are answered or not (an open loop, Poisson); users
    do not count then. prompt, answer: tokens of a request. shared: tokens at the beginning of each prompt
    that the prefix cache holds already. together: all users begin at the same moment with answers of one
    length, as the clients of a benchmark do; otherwise at moments of their own. repeats: how often a
    drafted token is right, 0 to 1; 0 where that is not known.
    """

    users: int = 1
    pause: float = 0.0
    arrivals: float | None = None
    prompt: int = 64
    answer: int = 128
    shared: int = 0
    together: bool = False
    repeats: float = 0.0

    def __post_init__(self) -> None:
        _between("users", self.users, 1, MOST_USERS)
        _between("pause", self.pause, 0, LONGEST_PAUSE_S)
        _between("prompt", self.prompt, 1, MOST_TOKENS)
        _between("answer", self.answer, 1, MOST_TOKENS)
        _between("shared", self.shared, 0, self.prompt)
        _between("repeats", self.repeats, 0, 0.99)
        if self.arrivals is not None:
            _between("arrivals", self.arrivals, 1e-6, MOST_A_SECOND)
        if self.together and (self.pause or self.arrivals is not None):
            raise ConfigError(
                "Users who begin together neither pause nor arrive one by one.",
                hint="Leave out --together, or --pause and --arrivals.",
            )

    @property
    def fresh(self) -> int:
        """Tokens of a prompt that are computed: at least the last one."""
        return max(1, self.prompt - self.shared)

    @property
    def most(self) -> int:
        """Requests that may be under way at once."""
        return self.users if self.arrivals is None else MOST_USERS


def _between(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise ConfigError(f"--{name} must lie between {least:,g} and {most:,g}, not {value:,g}.")
