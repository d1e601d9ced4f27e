"""Speculation changes nothing, shown at length on the real model: for each drafter and each kind of request a
hundred greedy answers, and many thousand draws.

A greedy answer may leave the plain one only at a near-tie, as the noise that `test_real.Noise` measures there
defines it. Where nothing rounds (`test_verify.py`, a model without rounding) there is no exception at all.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lichen.adapters.draft_head import DraftHead
from lichen.adapters.registry import Registry
from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.native import Adapter, Context, ContextSize, Model
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.runtime.speculation.drafter import Drafter
from lichen.runtime.speculation.head import HeadDrafter
from lichen.sync.download import hash_file
from tests.adapters.made_adapters import add_made
from tests.runtime.speculation.made_heads import following_head
from tests.runtime.speculation.small_native import Eager, Told
from tests.runtime.speculation.test_real import CASES, FORM, MORE, PROMPTS, Noise, check, noise

__all__ = ["noise"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LENGTH = 24
AT_ONCE = 3  # answers together, so that sequences with drafts and without share steps
SUBJECTS = tuple("rivers bread winter clocks gardens oceans owls paper bridges tea coal".split())  # noqa: SIM905 - one line
TASKS = (
    "Explain {} to a child.",
    "Write a rhyme about {}, then write it again.",
    "List five facts about {}.",
    "Say 'I like {}' six times.",
    "Write a short letter about {}.",
    "Which three questions would you ask about {}?",
    "Write a Python list of words about {}.",
    "Translate into French: we like {} and we like snow.",
)
ALL = [*PROMPTS, *MORE, *(task.format(subject) for task in TASKS for subject in SUBJECTS)][:100]
EVERY_CASE: dict[str, dict[str, Any]] = {**CASES, "n": {}, "adapter": {}}
DRAFTERS = ("suffix", "model", "head", "lying")


@pytest.fixture(scope="module")
def registry(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    made = Registry(tmp_path_factory.mktemp("adapted") / "adapters")
    made.promote("a", add_made(made, "a", model_path, 1, strength=0.2).digest)
    return made


@pytest.fixture(scope="module")
def bent_noise(model_path: Path, registry: Registry) -> Iterator[Noise]:
    """The noise of the model with the adapter."""
    model = Model(model_path)
    context = Context(model, ContextSize(context=1024, slots=1, threads=2, batch=256))
    adapter = Adapter(model, registry.file("a"))
    context.adapt(adapter, 1.0)
    yield Noise(context)
    context.close()
    adapter.close()
    model.close()


@pytest.fixture(scope="module")
def plain_answers() -> dict[tuple[str, str], list[Sequence]]:
    """(case, prompt) -> answers without drafts, the same for every drafter."""
    return {}


@pytest.fixture(params=DRAFTERS)
async def drafting(request: pytest.FixtureRequest, model_path: Path) -> AsyncIterator[ServedModel]:
    """The model with one drafter, which drafts whenever it can."""
    kind = request.param
    speculation = SpeculationOptions(
        drafters="model" if kind == "model" else "suffix",
        draft_model=model_path if kind == "model" else None,
    )
    options = ModelOptions(context=512, slots=AT_ONCE + 1, threads=2, speculation=speculation)
    served = await asyncio.to_thread(ServedModel.load, model_path, name=kind, sha256="", options=options)
    served.engine.speculation.controller = Eager()
    if kind == "lying":
        size = served.engine.model.vocab_size
        lies = Told(lambda tokens: [(tokens[-1] + 17 + at) % size for at in range(6)])
        served.engine.speculation.drafters[:] = [lies]
    elif kind == "head":
        drafter = HeadDrafter(await pair_head(served, model_path))
        served.engine.speculation.drafters[:] = [drafter]
        served.engine.speculation.readers.append(drafter)
        served.engine.context.wants_states = True
    yield served
    await asyncio.to_thread(served.close)


async def pair_head(served: ServedModel, model_path: Path) -> DraftHead:
    """A head that guesses what most often followed the last token in some answers."""
    texts = [(await ask(served, prompt, "greedy", drafts=False))[0].tokens for prompt in ALL[:6]]
    size = served.engine.model.vocab_size
    return following_head(texts, base=hash_file(model_path), vocabulary=size, hidden=576)


async def ask(served: ServedModel, prompt: str, case: str, *, drafts: bool) -> list[Sequence]:
    """Greedy answers of a case; two of them for `n`."""
    options = SamplingOptions(temperature=0, max_tokens=LENGTH, speculation=drafts, **EVERY_CASE[case])
    form = FORM if case == "schema" else AnswerForm()
    count = 2 if case == "n" else 1
    generations = await served.chat([{"role": "user", "content": prompt}], options, form, count=count)
    await asyncio.gather(*(generation.text() for generation in generations))
    return [generation.sequence for generation in generations]


@pytest.mark.parametrize("case", EVERY_CASE)
async def test_a_hundred_greedy_answers_are_the_same_up_to_near_ties(
    drafting: ServedModel,
    plain_answers: dict[tuple[str, str], list[Sequence]],
    noise: Noise,
    bent_noise: Noise,
    registry: Registry,
    case: str,
) -> None:
    served = drafting
    if case == "adapter":
        served = await drafting.adapted("a", registry.version("a").digest, registry.file("a"))
    equal = compared = drafted = accepted = 0
    for at in range(0, len(ALL), AT_ONCE):
        prompts = ALL[at : at + AT_ONCE]
        for prompt in prompts:
            if (case, prompt) not in plain_answers:
                plain_answers[case, prompt] = await ask(served, prompt, case, drafts=False)
        answers = await asyncio.gather(*(ask(served, prompt, case, drafts=True) for prompt in prompts))
        for prompt, sequences in zip(prompts, answers, strict=True):
            plain = plain_answers[case, prompt][0]
            assert plain.drafted == 0
            for sequence in sequences:
                where = bent_noise if case == "adapter" else noise
                equal += check(where, plain, sequence, EVERY_CASE[case])
                compared += 1
                drafted, accepted = drafted + sequence.drafted, accepted + sequence.accepted
    if case == "adapter":
        served.release()
    print(f"{equal} of {compared} answers are equal, {accepted} of {drafted} drafted tokens were right")
    assert compared >= 100 and drafted > 50
    assert equal > compared / 2
    if served.info.name.startswith("lying"):
        assert accepted < drafted / 100
    elif (served.info.name, case) != ("suffix", "penalties"):  # penalties keep answers from repeating
        assert accepted > 20


DRAWS = 20_000
SLICE = 4  # tokens that may be drawn
DRAWN = 5  # of an answer; all but the first come from steps that may draft


async def test_draws_with_drafts_and_without_have_one_distribution(model_path: Path) -> None:
    """Chi-square of two samples over the draws behind every beginning, with other seeds on each side.

    A bias leaves four tokens to draw from, so that each beginning occurs often. The drafter always guesses,
    and is often right.
    """
    speculation = SpeculationOptions(drafters="suffix")
    options = ModelOptions(context=128, slots=4, threads=2, speculation=speculation)
    served = await asyncio.to_thread(ServedModel.load, model_path, name="m", sha256="", options=options)
    try:
        served.engine.speculation.controller = Eager()
        few = [served.tokenize(f" {word}")[0] for word in ("red", "blue", "green", "black")]
        likeliest: list[Drafter] = [Told(lambda tokens: [few[(few.index(tokens[-1]) + 1) % SLICE]] * 2)]
        served.engine.speculation.drafters[:] = likeliest
        counted = [await draws(served, few, drafts, seed) for drafts, seed in ((False, 0), (True, 1 << 20))]
    finally:
        await asyncio.to_thread(served.close)
    (plain, _), (drafted, accepted) = counted
    total = [sum(sum(counts.values()) for counts in one.values()) for one in (plain, drafted)]
    assert min(total) >= DRAWS and accepted > DRAWS / 20
    statistic, degrees = two_samples(plain, drafted)
    # The normal approximation of the chi-square distribution (Wilson and Hilferty): p >= 0.01 below 2.326.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    print(f"chi-square {statistic:.0f}, {degrees} degrees of freedom, {total} draws, z = {z:.2f}")
    assert z < 2.326


Draws = dict[tuple[int, ...], Counter[int]]  # beginning of an answer -> what was drawn behind it


async def draws(served: ServedModel, few: list[int], drafts: bool, seed: int) -> tuple[Draws, int]:
    """What was drawn where drafts are possible, and how many of these were guessed."""
    found: Draws = {}
    accepted = 0
    wanted = functools.partial(
        SamplingOptions,
        temperature=1.0,
        max_tokens=DRAWN,
        logit_bias=dict.fromkeys(few, 100.0),
        speculation=drafts,
    )
    for begin in range(0, DRAWS // (DRAWN - 1) + 16, 16):
        generations = []
        for at in range(16):
            options = wanted(seed=seed + begin + at)
            generations += await served.complete("Colours of the day:", options)
        for generation in generations:
            await generation.text()
            sequence = generation.sequence
            said = tuple(sequence.tokens[len(sequence.prompt) :])
            accepted += sequence.accepted
            for at in range(1, len(said)):
                found.setdefault(said[:at], Counter())[said[at]] += 1
    return found, accepted


def two_samples(one: Draws, other: Draws) -> tuple[float, int]:
    """The chi-square statistic of homogeneity, and its degrees of freedom; rare cells are put together."""
    statistic, degrees = 0.0, 0
    for beginning in one.keys() & other.keys():
        left, right = one[beginning], other[beginning]
        sizes = sum(left.values()), sum(right.values())
        cells = [(left[token], right[token]) for token in left.keys() | right.keys()]
        large = [cell for cell in cells if sum(cell) * min(sizes) / sum(sizes) >= 5]
        small = [cell for cell in cells if cell not in large]
        if small:
            rest = (sum(a for a, _ in small), sum(b for _, b in small))
            large += [rest] if sum(rest) * min(sizes) / sum(sizes) >= 5 else []
        if len(large) < 2:
            continue
        whole = sum(a for a, _ in large), sum(b for _, b in large)
        for a, b in large:
            for seen, size in ((a, whole[0]), (b, whole[1])):
                expected = (a + b) * size / sum(whole)
                statistic += (seen - expected) ** 2 / expected
        degrees += len(large) - 1
    return statistic, degrees
