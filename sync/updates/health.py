"""The health prompt: what a new version has to show before it is kept.

The publisher states the bar beside the version (its manifest) or in the rollout; an engine, which this layer
does not know, measures; `verdict` compares. Speed is judged against the version before, measured on the same
machine minutes ago, and against an absolute bar. Perplexity: exp of the mean negative log-likelihood of a
text's tokens in nats, as in Jelinek et al. (1977).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1, max_length=16_384)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Prompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question as a user's message, answered greedily in at most `max_tokens` tokens.

    expects: an answer with any of these in it, upper and lower case alike, passes; without any, every answer
    that is not empty passes.
    """

    text: Text
    expects: Annotated[tuple[Text, ...], Meta(max_length=16)] = ()
    max_tokens: Annotated[int, Meta(ge=1, le=512)] = 48


class Health(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bar. passes: share of the prompts that must pass. perplexity: the most that `text` may have.

    rate: tokens a second that answers must reach. rate_share: of the rate of the version before, where
    there is one. seconds: for the whole trial; a version that has not answered by then fails.
    """

    prompts: Annotated[tuple[Prompt, ...], Meta(max_length=32)] = ()
    passes: Share = 1.0
    text: Annotated[str, Meta(max_length=65_536)] = ""
    perplexity: Annotated[float, Meta(gt=1, le=1e9)] | None = None
    rate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    rate_share: Annotated[float, Meta(ge=0, le=10)] = 0.0
    seconds: Annotated[float, Meta(ge=1, le=3600)] = 300.0


DEFAULT_HEALTH = Health(prompts=(Prompt(text="Say hello.", max_tokens=16),))  # where nobody set a bar


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a version answered to one prompt, and its tokens and seconds after the first token."""

    text: str
    tokens: int
    seconds: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a trial. passed of asked prompts. rate: tokens a second, None if nothing was answered.

    rate_before: of the version before, where it was measured too. perplexity: of the bar's text, if any.
    """

    asked: int = 0
    passed: int = 0
    rate: float | None = None
    rate_before: float | None = None
    perplexity: float | None = None


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A version that is here, whole and verified. slot: "models/support". path: its file.

    base, base_sha256: the file of the model that an adapter or a checkpoint belongs to.
    """

    slot: str
    sha256: str
    path: Path
    base: Path | None = None
    base_sha256: str = ""


class Trial(Protocol):
    """Who can run a version: the engine, seen from here."""

    async def answers(self, version: Installed, prompts: tuple[Prompt, ...]) -> list[Answer]:
        """Load the version and answer every prompt. Raises LichenError if it cannot."""
        ...

    async def perplexity(self, version: Installed, text: str) -> float:
        """Perplexity of a text under the version. Raises LichenError if it cannot."""
        ...


def measured(health: Health, answers: list[Answer], perplexity: float | None) -> Measured:
    """What a trial showed."""
    passed = sum(map(_passes, health.prompts, answers))
    tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
    rate = tokens / seconds if seconds > 0 else None
    return Measured(asked=len(health.prompts), passed=passed, rate=rate, perplexity=perplexity)


def verdict(health: Health, now: Measured) -> str:
    """Why a version fails its bar, in one sentence; "" if it passes."""
    if now.passed < math.ceil(health.passes * now.asked - 1e-9):
        return f"It answered {now.passed} of {now.asked} health prompts as expected."
    if health.perplexity is not None and not (now.perplexity or math.inf) <= health.perplexity:
        found = now.perplexity or math.inf
        return f"Its perplexity is {found:.2f}, and at most {health.perplexity:.2f} was asked."
    bar = health.rate
    if now.rate_before is not None:
        bar = max(bar, health.rate_share * now.rate_before)
    if bar and (now.rate or 0.0) < bar:
        return f"It makes {now.rate or 0.0:.1f} tokens a second, and {bar:.1f} were asked."
    return ""


def _passes(prompt: Prompt, answer: Answer) -> bool:
    said = answer.text.casefold()
    return any(word.casefold() in said for word in prompt.expects) if prompt.expects else bool(said.strip())
