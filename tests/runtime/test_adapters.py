"""Adapters served over the real default model: the cache keeps them apart, and none is in memory too long."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.adapters.registry import Registry
from lichen.adapters.versions import Version
from lichen.errors import AdapterError, NotFound, OutOfMemory, RequestError
from lichen.runtime.adapters import Adapters
from lichen.runtime.sequence import Piece, SamplingOptions, TokenLogprob
from lichen.runtime.served_model import ServedModel
from tests.adapters.made_adapters import add_made, write_made

PROMPT = "The river was high that spring, and the ferry did not go. " * 8
APART = 0.6  # nats between the first tokens of two adapters, at least
ALIKE = 0.3  # of the same in batches of another shape, at most; activations are rounded to 8 bits


@pytest.fixture(scope="module")
def registry(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """With the adapters a and b."""
    registry = Registry(tmp_path_factory.mktemp("adapters"))
    for seed, name in enumerate("ab"):
        registry.promote(name, add_made(registry, name, model_path, seed, strength=0.3).digest)
    return registry


@pytest.fixture(scope="module")
def versions(registry: Registry) -> dict[str, Version]:
    return {name: registry.version(name) for name in "ab"}


async def view(served: ServedModel, registry: Registry, name: str) -> ServedModel:
    """The model with an adapter, or alone for no name."""
    if not name:
        return served
    version = registry.version(name)
    return await served.adapted(name, version.digest, registry.file(name))


Answer = tuple[list[int], dict[int, float], int]


async def answer(model: ServedModel, prompt: str, **options: Any) -> Answer:
    """Tokens of a greedy answer, the likeliest first ones with their log-probabilities, and cached tokens."""
    sampling = SamplingOptions(temperature=0, max_tokens=4, top_logprobs=20, **options)
    (generation,) = await model.complete(prompt, sampling)
    tokens: list[TokenLogprob] = []
    async for event in generation:
        if isinstance(event, Piece):
            tokens += event.tokens
    assert generation.finished is not None
    first = {token: logprob for token, _, logprob in tokens[0].top}
    return [token.token for token in tokens], first, generation.finished.usage.cached_tokens


def apart(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference among the likeliest five of `one`, in nats."""
    best = sorted(one, key=lambda token: -one[token])[:5]
    return max(abs(one[token] - other.get(token, -50.0)) for token in best)


async def test_a_then_b_then_a_on_a_shared_beginning_equals_cold_runs(
    served: ServedModel, registry: Registry
) -> None:
    seen: list[tuple[str, dict[int, float]]] = []
    for name in ["a", "b", "a", "", "b", "", "a"]:
        model = await view(served, registry, name)
        _, first, cached = await answer(model, PROMPT + "And then")
        again = name in {one for one, _ in seen}
        assert (cached > 64) == again, "only what the same adapter computed is used again"
        seen.append((name, first))
    cold = {}
    for name in ("a", "b", ""):
        model = await view(served, registry, name)
        cold[name] = (await answer(model, PROMPT + "And then", deterministic=True))[1]
    assert apart(cold["a"], cold["b"]) > APART < apart(cold["a"], cold[""])
    for number, (name, first) in enumerate(seen):
        assert apart(cold[name], first) < ALIKE, f"request {number} with {name!r}"


async def test_all_at_once_each_gets_its_own(served: ServedModel, registry: Registry) -> None:
    views = {name: await view(served, registry, name) for name in ("a", "b", "")}
    cold = {name: (await answer(model, "Once more:", deterministic=True))[1] for name, model in views.items()}
    names = ["a", "b", "", "b", "a", "", "a", "b"]
    found = await asyncio.gather(*(answer(views[name], "Once more:") for name in names))
    for name, (_, first, _) in zip(names, found, strict=True):
        assert apart(cold[name], first) < ALIKE, name


async def test_scale_belongs_to_the_key_and_0_is_the_model_alone(
    served: ServedModel, registry: Registry
) -> None:
    model = await view(served, registry, "a")
    prompt = "Half as strong. " * 20
    whole, half, none = [(await answer(model, prompt, adapter_scale=by))[1] for by in (1.0, 0.5, 0.0)]
    assert apart(whole, half) > APART / 3 and apart(half, none) > APART / 3
    assert apart(none, (await answer(served, prompt))[1]) < ALIKE
    assert apart(half, (await answer(model, prompt, adapter_scale=0.5))[1]) < ALIKE
    with pytest.raises(RequestError, match="MODEL:ADAPTER"):
        await answer(served, prompt, adapter_scale=0.5)


async def test_embeddings_are_made_with_the_adapter(served: ServedModel, registry: Registry) -> None:
    model = await view(served, registry, "a")
    plain, _ = await served.embed("A boat.")
    adapted, _ = await model.embed("A boat.")
    again, _ = await served.embed("A boat.")
    assert plain == again
    assert sum(x * y for x, y in zip(plain, adapted, strict=True)) < 0.999


async def test_several_answers_of_one_prompt_share_its_prefill(
    served: ServedModel, registry: Registry
) -> None:
    model = await view(served, registry, "b")
    generations = await model.complete(
        "Three of them. " * 20, SamplingOptions(max_tokens=3, temperature=0), count=3
    )
    texts = [await generation.text() for generation in generations]
    assert len(set(texts)) == 1
    cached = sorted(g.finished.usage.cached_tokens for g in generations if g.finished)
    assert cached[0] == 0 and min(cached[1:]) > 32


async def test_idle_adapters_leave_by_last_use_and_pinned_ones_stay(
    served: ServedModel, registry: Registry, versions: dict[str, Version]
) -> None:
    size = versions["a"].size
    adapters = Adapters(served.engine, served.path, limit=2 * size)
    third = write_made(registry.folder / ".third.gguf", served.path, 7)
    files = {"a" * 64: registry.file("a"), "b" * 64: registry.file("b"), "c" * 64: third}
    for digest in ("a" * 64, "b" * 64, "a" * 64):
        (await adapters.lease(digest, files[digest])).close()
    (await adapters.lease("c" * 64, third)).close()
    assert [one.sha256[0] for one in adapters.status()] == ["a", "c"], "b was used the longest ago"
    adapters.pin("a" * 64)
    (await adapters.lease("b" * 64, files["b" * 64])).close()
    assert [one.sha256[0] for one in adapters.status()] == ["a", "b"]
    held = await adapters.lease("b" * 64, files["b" * 64])
    with pytest.raises(OutOfMemory):
        await adapters.lease("c" * 64, third)
    held.close()
    adapters.pin("a" * 64, pinned=False)
    for digest in ("a" * 64, "b" * 64):
        assert adapters.drop(digest) > 0
    with pytest.raises(NotFound):
        adapters.drop("a" * 64)
    third.unlink()


async def test_a_file_that_does_not_fit_never_reaches_the_native_loader(
    served: ServedModel, tmp_path: Path
) -> None:
    wrong = write_made(tmp_path / "x.gguf", served.path, 1, general_architecture="qwen2")
    before = served.adapters.status()
    for _ in range(2):  # a failed load is tried again
        with pytest.raises(AdapterError, match="models of the kind 'qwen2'"):
            await served.adapters.lease("d" * 64, wrong)
    assert served.adapters.status() == before


async def test_an_adapter_that_is_retired_while_it_answers_serves_to_the_end(
    served: ServedModel, registry: Registry
) -> None:
    model = await view(served, registry, "a")
    (generation,) = await model.complete("Count:", SamplingOptions(max_tokens=24, temperature=0))
    digest, retired = registry.version("a").digest, threading.Event()

    def retire() -> None:
        served.engine.adapters.retire(digest)
        retired.set()

    served.engine.call(retire)
    assert await asyncio.to_thread(retired.wait, 20)
    await generation.text()
    assert generation.finished is not None and generation.finished.usage.completion_tokens == 24
    served.engine.call(lambda: served.engine.adapters.load(digest, registry.file("a")))  # as it was


async def test_the_embedded_api_names_an_adapter(model_path: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "adapters")
    version = add_made(registry, "mine", model_path, 3)
    async with lichen.Runtime(model=model_path, home=tmp_path, context=512, slots=1) as runtime:
        with pytest.raises(NotFound, match="promote"):
            await runtime.complete("Hi", adapter="mine", max_tokens=2)
        early = await runtime.complete("Hi", adapter=f"mine@{version.digest[:8]}", max_tokens=2)
        registry.promote("mine", version.digest)
        completion = await runtime.complete("Hi", adapter="mine", max_tokens=2, adapter_scale=0.5)
        assert (early.adapter.digest, early.adapter.scale) == (version.digest, 1.0)
        assert (completion.adapter.digest, completion.adapter.scale) == (version.digest, 0.5)
        assert not (await runtime.complete("Hi", max_tokens=2)).adapter
        assert await runtime.embed("Hi", adapter="mine") != await runtime.embed("Hi")
        registry.rollback("mine")
        assert not (await runtime.complete("Hi", adapter="mine", max_tokens=2)).adapter
