"""A long system prompt is warm in a model that was loaded afresh, and the answer is the same."""

from __future__ import annotations

import asyncio
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


def conversation(sentences: int) -> list[dict[str, str]]:
    """A system prompt of about 21 tokens a sentence, and a question."""
    system = "".join(WORDS.format(n, n * 7 % 13) for n in range(sentences))
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


def assert_equal_up_to_a_tie(loads: Loads, answer: list[int], cold: list[int]) -> None:
    """Both are the plain loop's greedy answer as far as they go without a near-tie."""
    if answer == cold:
        return
    with plain_loop(loads.path, context=4096) as (_, run):
        for at, step in enumerate(run(loads.prompt, LENGTH)):
            if not answer[at] == cold[at] == step.token:
                assert step.lead < NEAR_TIE, f"token {at}: no tie, lead {step.lead:.3f}"
                return


@pytest.mark.parametrize("sentences", [30, pytest.param(97, marks=pytest.mark.slow)])
async def test_a_long_system_prompt_is_warm_after_a_restart(
    model_path: Path, tmp_path: Path, sentences: int
) -> None:
    loads, asked = Loads(model_path, tmp_path), conversation(sentences)
    cold, end, cold_s = await loads.ask(asked)
    assert end.usage.cached_tokens == 0
    assert end.usage.prompt_tokens > 20 * sentences
    assert len(files(loads.folder)) == 1
    again, end, warm_s = await loads.ask(asked)
    assert end.usage.cached_tokens == end.usage.prompt_tokens - 1
    assert_equal_up_to_a_tie(loads, again, cold)
    other = [asked[0], {"role": "user", "content": "How many bridges are there?"}]
    _, end, _ = await loads.ask(other)
    assert end.usage.cached_tokens > 19 * sentences
    assert warm_s < cold_s / 2, f"{warm_s:.3f} s warm, {cold_s:.3f} s cold"


async def test_a_damaged_file_gives_the_same_right_answer(model_path: Path, tmp_path: Path) -> None:
    loads, asked = Loads(model_path, tmp_path), conversation(30)
    cold, _, _ = await loads.ask(asked)
    for path in files(loads.folder):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    answer, end, _ = await loads.ask(asked)
    assert end.usage.cached_tokens == 0
    assert_equal_up_to_a_tie(loads, answer, cold)
