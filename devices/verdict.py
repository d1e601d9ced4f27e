"""Whether a plan keeps what was asked for, and where none does, why and what could be had instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from lichen.devices.cost import Prediction
from lichen.devices.intent import Objectives
from lichen.devices.pace import Plan
from lichen.errors import ConfigError

MOST_REFUSED = 0.01  # share of requests that may find the queue full

Say = Callable[[Sequence[Prediction], Objectives], str]


class Candidate(msgspec.Struct, frozen=True):
    """A plan and what it is predicted to do."""

    plan: Plan
    prediction: Prediction


def broken(candidate: Candidate, objectives: Objectives) -> list[str]:
    """Names of the objectives that a candidate does not keep."""
    found = candidate.prediction
    kept = {
        "load": found.refused <= MOST_REFUSED,
        "ttft": objectives.ttft is None or found.ttft <= objectives.ttft,
        "itl": objectives.itl is None or found.itl <= objectives.itl,
        "rate": objectives.rate is None or found.rate >= objectives.rate,
        "memory": objectives.memory is None or found.memory <= objectives.memory,
        "quality": found.quality >= objectives.quality,
    }
    return [name for name, is_kept in kept.items() if not is_kept]


def unattainable(everything: Sequence[Candidate], objectives: Objectives) -> ConfigError:
    """The error that tells it, with numbers."""
    return ConfigError(
        f"No plan on this machine keeps what was asked: {'; '.join(in_the_way(everything, objectives))}.",
        hint="Ask for less, expect fewer users, or take a smaller model.",
    )


def in_the_way(everything: Sequence[Candidate], objectives: Objectives) -> list[str]:
    """For each objective that stands in the way, the best that can be had while the others are kept.

    Where no single one does, the best of each that no plan keeps; where each can be kept alone, the best
    of each under the most of the others that can be kept together.
    """
    missed = [(set(broken(one, objectives)), one.prediction) for one in everything]
    for names in (1, 2, 3, 4, 5, 6):
        sets = {frozenset(which) for which, _ in missed if len(which) == names}
        if not sets:
            continue
        told = []
        for which in sorted(sets, key=sorted):
            among = [found for missing, found in missed if missing <= which]
            told.append(" with ".join(_WORDS[name](among, objectives) for name in sorted(which)))
        return told
    return []


def _ttft(found: Sequence[Prediction], asked: Objectives) -> str:
    best = min(one.ttft for one in found)
    return f"a first token after {_time(best)} is attainable, not {_time(asked.ttft or 0)} (--ttft)"


def _itl(found: Sequence[Prediction], asked: Objectives) -> str:
    best = min(one.itl for one in found)
    return f"{_time(best)} between two tokens are attainable, not {_time(asked.itl or 0)} (--itl)"


def _rate(found: Sequence[Prediction], asked: Objectives) -> str:
    best = max(one.rate for one in found)
    return f"{best:,.0f} tokens/s are attainable, not {asked.rate or 0:,.0f} (--tokens-per-second)"


def _memory(found: Sequence[Prediction], asked: Objectives) -> str:
    best = min(one.memory for one in found)
    return f"{best / 1e6:,.0f} MB are needed, more than {(asked.memory or 0) / 1e6:,.0f} MB (--memory)"


def _quality(found: Sequence[Prediction], asked: Objectives) -> str:
    best = max(one.quality for one in found)
    return f"a quality of {best:.4f} is attainable, not {asked.quality:.4f} (--quality)"


def _load(found: Sequence[Prediction], _: Objectives) -> str:
    best = min(one.refused for one in found)
    return f"{best:.0%} of the requests would be refused (--arrivals)"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


_WORDS: dict[str, Say] = {
    "ttft": _ttft,
    "itl": _itl,
    "rate": _rate,
    "memory": _memory,
    "quality": _quality,
    "load": _load,
}
