"""Fast path equals slow path: the engine's greedy tokens against a plain `llama_decode` loop.

Alone, they must be equal. Together, a batch of another shape rounds differently, so a sequence may leave
the plain path, but only where the two best tokens were almost equal: the test shows that tie.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from lichen.runtime.native import Model
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.served_model import ServedModel
from tests.conftest import RunningDaemon
from tests.runtime.plain_loop import Step, plain_loop

LENGTH = 32
NEAR_TIE = 0.35  # logits; what rounding of 4-bit weights in another batch shape can turn over
GREEDY = SamplingOptions(temperature=0, max_tokens=LENGTH)

QUESTIONS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about moss.",
    "How do I boil an egg?",
    "Name three colours.",
    "What is 12 times 9?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "Why do leaves fall in autumn?",
    "Write a Python function that adds two numbers.",
    "Summarise the story of Cinderella.",
    "What is photosynthesis?",
    "List the planets of the solar system.",
    "How far away is the Moon?",
    "Write a polite e-mail that declines an invitation.",
    "What does HTTP stand for?",
    "Describe the taste of a lemon.",
    "Tell me a joke about computers.",
    "What should I pack for a hike?",
]

Plain = tuple[Model, Callable[[list[int], int], list[Step]]]


@pytest.fixture(scope="module")
def plain(model_path: Path) -> Iterator[Plain]:
    with plain_loop(model_path) as (model, run):
        known: dict[tuple[int, ...], list[Step]] = {}

        def once(prompt: list[int], length: int) -> list[Step]:
            key = (*prompt, length)
            if key not in known:
                known[key] = run(prompt, length)
            return known[key]

        yield model, once


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


async def greedy(served: ServedModel, question: str) -> list[int]:
    (generation,) = await served.chat(messages(question), GREEDY)
    await generation.text()
    return generation.sequence.tokens[len(generation.sequence.prompt) :]


@pytest.mark.parametrize("question", QUESTIONS)
def test_alone_over_http_every_token_equals_the_plain_loop(
    daemon: RunningDaemon, served: ServedModel, plain: Plain, question: str
) -> None:
    model, run = plain
    expected = [step.token for step in run(served.chat_tokens(messages(question)), LENGTH)]
    with openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=daemon.model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=LENGTH,
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected)
    text = b"".join(model.piece(token) for token in expected).decode("utf-8", "ignore")
    assert answer.choices[0].message.content == text


async def test_eight_at_once_differ_only_from_a_near_tie_on(served: ServedModel, plain: Plain) -> None:
    questions = QUESTIONS[:8]
    answers = await asyncio.gather(*(greedy(served, question) for question in questions))
    for question, answer in zip(questions, answers, strict=True):
        expected = plain[1](served.chat_tokens(messages(question)), LENGTH)
        for at, step in enumerate(expected):
            if answer[at] != step.token:
                print(f"{question!r} leaves the plain path at token {at}: lead {step.lead:.3f}")
                assert step.lead < NEAR_TIE, f"{question!r} at token {at}: no tie, lead {step.lead:.3f}"
                break
