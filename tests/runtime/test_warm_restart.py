"""A long system prompt is warm in a model that was loaded afresh, and the answer is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.runtime.sequence import Finished, SamplingOptions
from lichen.runtime.served_model import ModelOptions, ServedModel
from tests.runtime.plain_loop import plain_loop
from tests.runtime.test_greedy_equality import NEAR_TIE
from tests.runtime.test_spill import files

LENGTH = 24
QUESTION = "What do people carry over the bridge?"
WORDS = "Keep in mind that the old river number {} turns under bridge {} while people carry fruit. "


@pytest.fixture(scope="module")
def conversation() -> list[dict[str, str]]:
    """About 2,000 tokens of a system prompt, and a question."""
    system = "".join(WORDS.format(n, n * 7 % 13) for n in range(97))
    return [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]


class Loads:
    """The real model, loaded afresh over one cache folder."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    async def ask(self, messages: list[dict[str, str]]) -> tuple[list[int], Finished, float]:
        """A greedy answer of a fresh model: its tokens, its end, and the seconds to its first token."""
        options = ModelOptions(context=4096, slots=2, threads=2, spill_folder=self.folder)
        served = await asyncio.to_thread(ServedModel.load, self.path, name="m", sha256="", options=options)
        try:
            (generation,) = await served.chat(messages, SamplingOptions(temperature=0, max_tokens=LENGTH))
            await generation.text()
            assert generation.finished is not None
            answer = generation.sequence.tokens[len(generation.sequence.prompt) :]
            self.prompt = generation.sequence.prompt
            return answer, generation.finished, generation.finished.timings.ttft_s
        finally:
            await asyncio.to_thread(served.close)


@pytest.fixture(scope="module")
def loads(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loads]:
    yield Loads(model_path, tmp_path_factory.mktemp("prefix-cache"))


def assert_equal_up_to_a_tie(loads: Loads, answer: list[int], cold: list[int]) -> None:
    """Both are the plain loop's greedy answer as far as they go without a near-tie."""
    if answer == cold:
        return
    with plain_loop(loads.path, context=4096) as (_, run):
        for at, step in enumerate(run(loads.prompt, LENGTH)):
            if not answer[at] == cold[at] == step.token:
                assert step.lead < NEAR_TIE, f"token {at}: no tie, lead {step.lead:.3f}"
                return


async def test_a_long_system_prompt_is_warm_after_a_restart(
    loads: Loads, conversation: list[dict[str, str]]
) -> None:
    cold, end, cold_s = await loads.ask(conversation)
    assert end.usage.cached_tokens == 0
    assert end.usage.prompt_tokens > 2000
    assert len(files(loads.folder)) == 1
    again, end, warm_s = await loads.ask(conversation)
    assert end.usage.cached_tokens == end.usage.prompt_tokens - 1
    assert_equal_up_to_a_tie(loads, again, cold)
    other = [conversation[0], {"role": "user", "content": "How many bridges are there?"}]
    _, end, _ = await loads.ask(other)
    assert end.usage.cached_tokens > 1900
    assert warm_s < cold_s / 2, f"{warm_s:.3f} s warm, {cold_s:.3f} s cold"


async def test_a_damaged_file_gives_the_same_right_answer(
    loads: Loads, conversation: list[dict[str, str]]
) -> None:
    cold, _, _ = await loads.ask(conversation)
    for path in files(loads.folder):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    answer, end, _ = await loads.ask(conversation)
    assert end.usage.cached_tokens == 0
    assert_equal_up_to_a_tie(loads, answer, cold)
