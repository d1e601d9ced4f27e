"""Importance, sensitivity and the choice of types on tiny models, beside plain computation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lichen.errors import ConfigError, RequestError
from lichen.models.calibrate import batches, gather_importance
from lichen.models.decoder import Decoder
from lichen.models.load import build_model, load_model
from lichen.models.mixture import Mixer, quantization_error
from lichen.models.packing import pack
from lichen.models.sensitivity import Measure, divergence
from lichen.quant.allocate import Option
from lichen.quant.choice import plan_for
from lichen.quant.formats import GGMLType
from lichen.quant.gguf import GGUFFile, open_gguf
from lichen.quant.ledger import Ledger
from lichen.quant.quantize import planned_bytes, quantize_file, requantized
from tests.models.reference import distance
from tests.models.tiny_models import FAMILIES, VOCABULARY, write_tiny

WINDOWS = [
    [int(token) for token in np.random.default_rng(seed).integers(3, VOCABULARY, 40)] for seed in range(3)
]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GGUFFile]:
    """A tiny model; tied: the embedding is the output matrix too."""
    with open_gguf(write_tiny(tmp_path / "tiny.gguf", "llama", tied=request.param)) as opened:
        yield opened


def kl_of(path: Path, model: Decoder) -> float:
    packed = pack(WINDOWS)
    with torch.no_grad():
        return distance(load_model(path)(packed), model(packed)).mean


def test_a_measurement_is_that_of_the_whole_changed_file(file: GGUFFile, tmp_path: Path) -> None:
    model = build_model(file)
    measure = Measure(model, WINDOWS)
    kept = {name: tensor.type for name, tensor in file.tensors.items()}
    for names in (
        ["token_embd.weight"],
        ["blk.0.attn_q.weight"],
        ["blk.1.ffn_down.weight"],
        ["blk.0.ffn_up.weight", "blk.1.attn_v.weight"],
    ):
        path = tmp_path / "changed.gguf"
        quantize_file(file, path, kept | dict.fromkeys(names, GGMLType.Q4_0))
        found = measure.divergence({name: requantized(file.tensors[name], GGMLType.Q4_0) for name in names})
        assert found == pytest.approx(kl_of(path, model), rel=1e-3, abs=2e-6)
        assert found > 1e-4


def test_a_measurement_leaves_the_model_as_it_was(file: GGUFFile) -> None:
    model = build_model(file)
    packed = pack(WINDOWS)
    with torch.no_grad():
        before = model(packed)
    measure = Measure(model, WINDOWS)
    assert measure.divergence({}) < 1e-9
    changed = {name: requantized(file.tensors[name], GGMLType.Q4_0) for name in measure.measurable()}
    assert measure.divergence(changed) > 1e-3
    with pytest.raises(RequestError, match="No layer multiplies with output_norm"):
        measure.divergence({"output_norm.weight": file.tensors["output_norm.weight"]})
    with torch.no_grad():
        assert torch.equal(model(packed), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_mean_square_of_inputs(tmp_path: Path, family: str) -> None:
    model = load_model(write_tiny(tmp_path / "tiny.gguf", family))
    told: list[tuple[int, int]] = []
    found = gather_importance(model, WINDOWS, progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (120, 120)
    assert (found.tokens, found.chunk) == (120, 40)
    with torch.no_grad():
        packed = pack(WINDOWS)
        first = model.blocks[0].attn_norm(model.embed(packed)).square().mean(0)
        last = model.output_norm(model.run(model.embed(packed), packed)).square().mean(0)
    assert found["blk.0.attn_q.weight"][0] == pytest.approx(first.numpy(), rel=1e-4)
    assert found["output.weight"][0] == pytest.approx(last.numpy(), rel=1e-4)
    assert "token_embd.weight" not in found  # looked up, never multiplied with
    assert len(found) == 2 * 7 + 1


def test_a_small_divergence_over_a_large_vocabulary_is_not_lost_in_rounding() -> None:
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 50000, generator=source) * 3 + 12
    changed = logits + torch.randn(64, 50000, generator=source) * 1e-3
    p, q = (one.double().log_softmax(-1) for one in (logits, changed))
    expected = float((p.exp() * (p - q)).sum())
    assert expected / 64 < 1e-6
    assert divergence(logits.log_softmax(-1), changed) == pytest.approx(expected, rel=0.2)
    assert abs(divergence(logits.log_softmax(-1), logits)) < 1e-8


def test_no_text_is_an_error(file: GGUFFile) -> None:
    model = build_model(file)
    with pytest.raises(RequestError, match="no text"):
        gather_importance(model, [])
    with pytest.raises(RequestError, match="no text"):
        Measure(model, [])


def test_batches_hold_every_window_once() -> None:
    windows = [[1] * length for length in (5, 5, 30, 1, 9)]
    found = list(batches(windows, 10))
    assert [window for batch in found for window in batch] == windows
    assert [sum(map(len, batch)) for batch in found] == [10, 30, 10]


def test_importance_lowers_the_error_that_it_weighs(file: GGUFFile) -> None:
    importance = gather_importance(build_model(file), WINDOWS)
    tensor = file.tensors["blk.1.ffn_down.weight"]
    numbers = tensor.data.view(np.float32)

    def weighed(with_importance: bool) -> float:
        stored = requantized(tensor, GGMLType.Q4_0, importance if with_importance else None)
        again = np.empty_like(numbers)
        from lichen.quant import ggml

        ggml.dequantize(GGMLType.Q4_0, stored.data, again)
        return float(np.square(again - numbers).sum(0) @ importance[tensor.name][0])

    assert weighed(True) < weighed(False)
    assert quantization_error(tensor, GGMLType.Q4_0, importance) == pytest.approx(weighed(True), rel=1e-3)


KINDS = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0)


def test_a_choice_keeps_its_budget_and_beats_one_type_for_all(file: GGUFFile, tmp_path: Path) -> None:
    model = build_model(file)
    importance = gather_importance(model, WINDOWS)
    ledger = Ledger(tmp_path, "tiny")
    measure = Measure(model, WINDOWS)
    stages: list[str] = []
    mixer = Mixer(
        file,
        measure,
        importance,
        kinds=KINDS,
        ledger=ledger,
        tell=lambda what, _done, _of: stages.append(what),
    )
    ratings = mixer.ratings()
    for kind in (GGMLType.Q4_1, GGMLType.Q5_0):
        plain = plan_for(file.tensors.values(), kind).types
        quantize_file(file, tmp_path / "plain.gguf", plain, importance=importance)
        budget = (tmp_path / "plain.gguf").stat().st_size + 4096
        chosen = mixer.choose(budget, ratings)
        quantize_file(file, tmp_path / "chosen.gguf", chosen.types, importance=importance)
        assert (tmp_path / "chosen.gguf").stat().st_size <= budget
        assert planned_bytes(file, chosen.types) <= planned_bytes(file, plain) + 4096
        assert kl_of(tmp_path / "chosen.gguf", model) < kl_of(tmp_path / "plain.gguf", model)
        assert chosen.measured == pytest.approx(kl_of(tmp_path / "chosen.gguf", model), rel=1e-2)
    assert set(stages) == {"measuring tensors", "choosing types"}

    again = Measure(model, WINDOWS)
    kept = Mixer(file, again, importance, kinds=KINDS, ledger=Ledger(tmp_path, "tiny")).ratings()
    assert again.forwards == 0  # everything was in the ledger
    assert kept == ratings


def test_layers_may_share_a_measurement(file: GGUFFile) -> None:
    model = build_model(file)
    alone, shared = Measure(model, WINDOWS), Measure(model, WINDOWS)
    each = Mixer(file, alone, None, kinds=KINDS).ratings()
    both = Mixer(file, shared, None, kinds=KINDS, span=2).ratings()
    assert shared.forwards < alone.forwards
    assert list(both) == list(each)
    for part in ("attn_v", "ffn_down"):
        costs = [
            sum(_cost(ratings[f"blk.{layer}.{part}.weight"]) for layer in range(2))
            for ratings in (each, both)
        ]
        assert costs[1] == pytest.approx(costs[0], rel=0.5)  # shares of one KL, or two KLs


def _cost(options: list[Option]) -> float:
    return next(option.cost for option in options if option.type is GGMLType.Q4_0)


def test_too_small_a_budget_says_the_smallest(file: GGUFFile) -> None:
    mixer = Mixer(file, Measure(build_model(file), WINDOWS), None, kinds=KINDS)
    with pytest.raises(ConfigError, match=r"the smallest possible with these types is [\d,]+"):
        mixer.choose(1000, mixer.ratings())
