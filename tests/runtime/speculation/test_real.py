"""Greedy answers of the real model with and without drafts are equal up to the first near-tie.

What a near-tie is follows from noise that is measured here: the same context is computed in narrow steps and
in wide ones, and no choice may turn over whose lead is larger than what that does to logits.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from lichen.runtime.answer_form import AnswerForm
from lichen.runtime.native import DECODE_OK, Context, ContextSize, Model
from lichen.runtime.sampling import PENALTY_WINDOW
from lichen.runtime.sequence import SamplingOptions, Sequence
from lichen.runtime.served_model import ModelOptions, ServedModel
from lichen.runtime.speculation.build import SpeculationOptions
from lichen.runtime.speculation.drafter import NOTHING, Draft
from lichen.runtime.speculation.plan import Speculation
from tests.conftest import daemon_over
from tests.runtime.speculation.small_native import Eager

LENGTH = 32
SHAPES = ((256, 1), (256, 8), (64, 1), (64, 3), (7, 8))  # tokens of a step: of the prompt, of the answer
STORY = (
    "The ferry left the old harbour at six. Nobody on board knew the captain, but everybody knew the cat, "
    "which slept on the coiled rope near the bow."
)
PROMPTS = [
    f"Repeat this text word by word: {STORY}",
    f"Rewrite this text, with 'dog' instead of 'cat': {STORY}",
    "Write a Python function that adds two numbers, then the same function again.",
    "Count from one to twenty in words.",
    "What is the capital of France?",
    "List the planets of the solar system, each with one fact.",
]
MORE = [
    f"Write three sentences about {thing}, and then repeat them."
    for thing in (
        "bees",
        "salt",
        "ferries",
        "snow",
        "ink",
        "bread",
        "maps",
        "owls",
        "tea",
        "glass",
        "moss",
        "kites",
    )
]
FORM = AnswerForm(
    schema={
        "type": "object",
        "properties": {
            "place": {"type": "string", "maxLength": 24},
            "time": {"type": "string", "maxLength": 8},
        },
        "required": ["place", "time"],
        "additionalProperties": False,
    }
)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"presence_penalty": 0.6, "frequency_penalty": 0.3},
    "stop": {"stop": ("harbour at", " the cat", "two")},
    "schema": {},
}


class Replay:
    """Drafts an earlier answer to the same prompt, every ninth token of it wrong."""

    name = "replay"
    token_s = 0.0

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], list[int]] = {}

    def begin(self, sequence: Sequence) -> None: ...

    def end(self, sequence: Sequence) -> None: ...

    def close(self) -> None: ...

    def observe(self, sequence: Sequence, draft: Draft, accepted: int) -> None: ...

    def propose(self, sequence: Sequence, k: int) -> Draft:
        answer = self.known.get(tuple(sequence.prompt), [])
        ahead = range(sequence.drawn, min(sequence.drawn + k, len(answer)))
        tokens = [answer[at] + (at % 9 == 8) for at in ahead]
        return Draft(tokens, self.name) if tokens else NOTHING


@dataclass
class Speculating:
    served: ServedModel
    speculation: Speculation
    replay: Replay


@pytest.fixture(scope="module")
def speculating(model_path: Path) -> Iterator[Speculating]:
    """A model that drafts whenever it can: from suffixes, or by replay where an answer is known."""
    options = ModelOptions(
        context=1024, slots=4, threads=2, speculation=SpeculationOptions(drafters="suffix")
    )
    served = ServedModel.load(model_path, name="drafting", sha256="", options=options)
    speculation, replay = served.engine.speculation, Replay()
    speculation.controller = Eager()
    speculation.drafters.append(replay)
    yield Speculating(served, speculation, replay)
    served.close()


@pytest.fixture(scope="module")
def noise(model_path: Path) -> Iterator[Noise]:
    model = Model(model_path)
    context = Context(model, ContextSize(context=1024, slots=1, threads=2, batch=256))
    yield Noise(context)
    context.close()
    model.close()


class Noise:
    """Logits of one context, computed in steps of several widths."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def rows(self, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        """[vocab] float32 each, after prompt + answer, by how they were computed."""
        return {
            f"prompt by {most}, answer by {width}": self._row(prompt, answer, most, width)
            for most, width in SHAPES
        }

    def _row(self, prompt: list[int], answer: list[int], most: int, width: int) -> Any:
        context, tokens = self._context, prompt + answer
        context.clear(0)
        pieces = [(at, min(at + most, len(prompt))) for at in range(0, len(prompt), most)]
        pieces += [(at, min(at + width, len(tokens))) for at in range(len(prompt), len(tokens), width)]
        for start, stop in pieces:
            count = stop - start
            code = context.decode(
                tokens[start:stop], list(range(start, stop)), [0] * count, [0] * (count - 1) + [1]
            )
            assert code == DECODE_OK
        return context.logits(count - 1).copy()


async def answer(
    served: ServedModel, prompt: str, case: str, *, speculation: bool, count: int = 1
) -> list[Sequence]:
    options = SamplingOptions(temperature=0, max_tokens=LENGTH, speculation=speculation, **CASES[case])
    form = FORM if case == "schema" else AnswerForm()
    asked = [{"role": "user", "content": prompt}]
    generations = await served.chat(asked, options, form, count=count)
    await asyncio.gather(*(generation.text() for generation in generations))
    return [generation.sequence for generation in generations]


def check(noise: Noise, plain: Sequence, drafted: Sequence, options: Mapping[str, Any]) -> bool:
    """Whether both answers are equal; if not, they must part at a near-tie."""
    size = len(plain.prompt)
    ours, theirs = drafted.tokens[size:], plain.tokens[size:]
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        assert len(ours) == len(theirs)
        return True
    rows = noise.rows(plain.prompt, theirs[:at])
    counts = Counter(plain.tokens[: size + at][-PENALTY_WINDOW:])

    def value(row: Any, token: int) -> float:
        return float(
            row[token]
            - options.get("presence_penalty", 0.0) * (token in counts)
            - options.get("frequency_penalty", 0.0) * counts[token]
        )

    pairs = {shape: (value(row, theirs[at]), value(row, ours[at])) for shape, row in rows.items()}
    leads = [one - other for one, other in pairs.values()]
    first = next(iter(rows.values()))
    moved = max(float(np.abs(first - row).max()) for row in rows.values())
    told = (
        f"token {at}: {theirs[at]} without drafts, {ours[at]} with; logits move by up to {moved:.4f}"
        + "".join(f"; {shape}: {one:.4f} and {other:.4f}" for shape, (one, other) in pairs.items())
    )
    print(told)
    assert min(map(abs, leads)) <= 2 * moved + 1e-6 or min(leads) * max(leads) <= 0, told
    return False


async def compare(speculating: Speculating, noise: Noise, prompt: str, case: str) -> tuple[int, int]:
    """Plain, from suffixes, and by replay, three at once; (answers compared, of them equal)."""
    served, known = speculating.served, speculating.replay.known
    known.clear()
    (plain,) = await answer(served, prompt, case, speculation=False)
    drafted = await answer(served, prompt, case, speculation=True)
    known[tuple(plain.prompt)] = plain.tokens[len(plain.prompt) :]
    drafted += await answer(served, prompt, case, speculation=True, count=2)
    assert plain.drafted == 0
    return len(drafted), sum(check(noise, plain, one, CASES[case]) for one in drafted)


@pytest.mark.parametrize("case", CASES)
async def test_greedy_with_drafts_is_greedy_up_to_a_near_tie(
    speculating: Speculating, noise: Noise, case: str
) -> None:
    prompts = PROMPTS[:2] if case == "greedy" else PROMPTS[:1]
    before = speculating.served.engine.counters()
    results = [await compare(speculating, noise, prompt, case) for prompt in prompts]
    after = speculating.served.engine.counters()
    compared, equal = (sum(column) for column in zip(*results, strict=True))
    accepted = after.draft_accepted - before.draft_accepted
    print(f"{equal} of {compared} answers are equal, {accepted} drafted tokens were right")
    assert accepted > 8 * len(prompts)
    assert after.free_slots == 4


async def test_a_client_sees_what_was_drafted_and_may_do_without(
    speculating: Speculating, tmp_path: Path
) -> None:
    daemon = daemon_over(speculating.served, tmp_path)
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "temperature": 0, "max_tokens": LENGTH}
    async with TestClient(TestServer(daemon.application())) as client:

        async def timings(**more: Any) -> dict[str, Any]:
            answer = await client.post("/v1/chat/completions", json=body | more)
            assert answer.status == 200, await answer.text()
            found: dict[str, Any] = (await answer.json())["timings"]
            return found

        with_drafts = await timings()
        assert 0 < with_drafts["draft_n_accepted"] <= with_drafts["draft_n"]
        assert (await timings(speculation=False))["draft_n"] == 0
        for shown in (False, True):
            asked = body | {"stream": True, "show_drafts": shown}
            lines = (await (await client.post("/v1/chat/completions", json=asked)).text()).splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            marked = [event for event in events if "lichen" in event]
            assert all(event["lichen"] == {"drafted": True} for event in marked)
            assert 0 < len(marked) <= events[-1]["timings"]["draft_n_accepted"] if shown else not marked
        refused = await client.post("/v1/chat/completions", json=body | {"speculation": "yes"})
        assert refused.status == 400 and "speculation" in await refused.text()
        metrics = await (await client.get("/metrics")).text()
    counters = speculating.served.engine.counters()
    name = 'model_name="drafting"'
    assert f"vllm:spec_decode_num_draft_tokens_total{{{name}}} {counters.draft_tokens}\n" in metrics
    assert f"vllm:spec_decode_num_accepted_tokens_total{{{name}}} {counters.draft_accepted}\n" in metrics
    first = f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{name},position="0"}} '
    assert 0 < int(metrics.split(first)[1].split()[0]) <= counters.drafts


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
async def test_greedy_with_drafts_on_many_prompts(speculating: Speculating, noise: Noise, case: str) -> None:
    results = [await compare(speculating, noise, prompt, case) for prompt in PROMPTS + MORE]
    compared, equal = (sum(column) for column in zip(*results, strict=True))
    print(f"{equal} of {compared} answers are equal")
    assert equal > compared / 2


@pytest.fixture
async def thinking(model_path: Path) -> AsyncIterator[ServedModel]:
    """The model with itself as its draft model: all it says is right, and costs as much."""
    options = ModelOptions(
        context=512,
        slots=2,
        threads=2,
        speculation=SpeculationOptions(drafters="model", draft_model=model_path),
    )
    served = await asyncio.to_thread(ServedModel.load, model_path, name="m", sha256="", options=options)
    served.engine.speculation.controller = Eager()
    yield served
    await asyncio.to_thread(served.close)


async def test_a_draft_model_drafts_and_changes_nothing(thinking: ServedModel, noise: Noise) -> None:
    (plain,) = await answer(thinking, PROMPTS[4], "greedy", speculation=False)
    (drafted,) = await answer(thinking, PROMPTS[4], "greedy", speculation=True)
    check(noise, plain, drafted, {})
    assert drafted.accepted >= 0.8 * drafted.drafted > 0
