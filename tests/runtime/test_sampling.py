"""The sampler chain of the real model: it draws what it should, and a seed repeats it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lichen.runtime.native import DECODE_OK, Context, ContextSize, Model, Sampler, SamplerOptions
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.served_model import ServedModel

DRAWS = 4000
NEUTRAL = SamplerOptions(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repeat_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    penalty_window=64,
    logit_bias=(),
    seed=1,
)


class Prompted:
    """A context after one prompt, whose next-token logits are drawn from again and again."""

    def __init__(self, path: Path) -> None:
        self.model = Model(path)
        self.context = Context(self.model, ContextSize(context=256, slots=1, threads=2, batch=64))
        tokens = self.model.tokenize("The weather today is", special=True, add_bos=True)
        outputs = [*([0] * (len(tokens) - 1)), 1]
        code = self.context.decode(tokens, list(range(len(tokens))), [0] * len(tokens), outputs)
        assert code == DECODE_OK
        self.index = len(tokens) - 1
        self.logits = self.context.logits(self.index).tolist()

    def draw(self, count: int = 1, **changes: Any) -> list[int]:
        fields = {name: getattr(NEUTRAL, name) for name in NEUTRAL.__dataclass_fields__}
        sampler = Sampler(self.model, SamplerOptions(**{**fields, **changes}))
        drawn = [sampler.sample(self.context, self.index) for _ in range(count)]
        sampler.close()
        return drawn

    def ranked(self) -> list[int]:
        return sorted(range(len(self.logits)), key=self.logits.__getitem__, reverse=True)

    def probabilities(self, tokens: list[int], temperature: float) -> list[float]:
        peak = max(self.logits)
        weights = [math.exp((self.logits[token] - peak) / temperature) for token in tokens]
        total = sum(weights)
        return [weight / total for weight in weights]


@pytest.fixture(scope="module")
def prompted(model_path: Path) -> Iterator[Prompted]:
    prompted = Prompted(model_path)
    yield prompted
    prompted.context.close()
    prompted.model.close()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_softmax_of_the_kept_logits(prompted: Prompted, temperature: float) -> None:
    """Pearson's chi-square over the 8 likeliest tokens; 7 degrees of freedom, p = 1e-4 at 29.9."""
    kept = prompted.ranked()[:8]
    seen = Counter(prompted.draw(DRAWS, temperature=temperature, top_k=8, seed=7))
    assert seen.keys() <= set(kept)
    expected = [p * DRAWS for p in prompted.probabilities(kept, temperature)]
    chi_square = sum((seen[t] - e) ** 2 / e for t, e in zip(kept, expected, strict=True))
    assert chi_square < 29.9


def test_temperature_zero_takes_the_likeliest(prompted: Prompted) -> None:
    assert set(prompted.draw(20, temperature=0.0)) == {prompted.ranked()[0]}


def test_top_p_keeps_the_smallest_set_that_reaches_it(prompted: Prompted) -> None:
    ranked = prompted.ranked()[:200]
    total, kept = 0.0, set[int]()
    probabilities = prompted.probabilities(prompted.ranked(), 1.0)
    for token, probability in zip(ranked, probabilities, strict=False):
        kept.add(token)
        total += probability
        if total >= 0.4:
            break
    assert set(prompted.draw(1000, top_p=0.4)) <= kept


def test_min_p_drops_what_is_unlikely_beside_the_best(prompted: Prompted) -> None:
    best = max(prompted.logits)
    kept = {t for t, logit in enumerate(prompted.logits) if logit >= best + math.log(0.2) - 1e-3}
    assert set(prompted.draw(1000, min_p=0.2)) <= kept


def test_logit_bias_forces_and_forbids(prompted: Prompted) -> None:
    first, second = prompted.ranked()[:2]
    assert prompted.draw(temperature=0.0, logit_bias=((first, -100.0),)) == [second]
    assert set(prompted.draw(50, logit_bias=((123, 100.0),))) == {123}


def test_penalties_lower_what_was_drawn_before(prompted: Prompted) -> None:
    greedy = prompted.draw(
        3, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, repeat_penalty=1.5
    )
    assert len(set(greedy)) > 1, "the same logits thrice, but what was drawn before is penalised"


def test_a_seed_repeats_the_draws_and_another_does_not(prompted: Prompted) -> None:
    first, again, other = (prompted.draw(40, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


async def test_a_seed_repeats_an_answer_of_the_engine(served: ServedModel) -> None:
    async def answer(seed: int | None) -> str:
        options = SamplingOptions(temperature=1.0, seed=seed, max_tokens=24)
        return await (await served.complete("Once upon a time", options))[0].text()

    await answer(3)  # the prompt is cached from here on, so the next two see the same batches
    assert await answer(3) == await answer(3)
    assert len({*(await asyncio.gather(*(answer(None) for _ in range(3))))}) > 1
