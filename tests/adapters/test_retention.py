"""What keeps a training from forgetting does what its formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lichen.adapters.lora import adapted, attach, parameters, without_adapters
from lichen.adapters.objectives import common_beginning, supervised
from lichen.adapters.recall import TOP, Recalled, recall
from lichen.adapters.retention import Importance, Keeper, divergence, give, joined, taken
from lichen.adapters.task import Example, Keeping, LoRAOptions, Task
from lichen.models.decoder import Decoder
from lichen.models.load import load_model
from lichen.models.packing import pack
from lichen.quant.formats import GGMLType
from tests.adapters.tiny_rows import copying, rows_of, stir
from tests.models.tiny_models import FAMILIES, VOCABULARY, write_tiny

NUMBERS = st.lists(st.integers(-1000, 1000), min_size=3, max_size=3)
PROMPTS = [[1, 260 + number, 270, 300 - number] for number in range(6)]


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    """Two layers of random weights, the upper one adapted."""
    model = load_model(write_tiny(tmp_path / "m.gguf", "llama", kind=GGMLType.Q8_0))
    attach(model, LoRAOptions(rank=4))
    return model


@given(NUMBERS, NUMBERS)
def test_a_joined_step_goes_against_neither_aim(first: list[int], second: list[int]) -> None:
    learn, keep = (torch.tensor(numbers, dtype=torch.float64) for numbers in (first, second))
    step = joined(learn, keep)
    slack = 1e-9 * float(learn.norm() * keep.norm() + learn.norm() ** 2 + keep.norm() ** 2)
    assert float(torch.dot(step, learn)) >= -slack
    assert float(torch.dot(step, keep)) >= -slack


def test_what_is_kept_counts_for_no_more_than_what_is_learned() -> None:
    learn, keep = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert torch.allclose(joined(learn, keep * 1000), torch.tensor([3.0, 3.0]))
    assert torch.equal(joined(learn, keep / 8), torch.tensor([3.0, 0.5]))


def test_opposite_aims_leave_no_step_and_one_aim_alone_is_taken_whole() -> None:
    one = torch.tensor([1.0, -2.0, 3.0])
    assert float(joined(one, -one).norm()) < 1e-6
    assert torch.equal(joined(one, torch.zeros(3)), one)


def test_own_answers_come_with_the_distributions_they_were_drawn_from(model: Decoder) -> None:
    found = recall(model, PROMPTS, ends=frozenset([2]), length=9, seed=1)
    stir(model)  # adapters do not matter
    again = recall(model, PROMPTS, ends=frozenset([2]), length=9, seed=1)
    other = recall(model, PROMPTS, ends=frozenset([2]), length=9, seed=2)
    assert [one.example for one in found] == [one.example for one in again]
    assert [one.example for one in found] != [one.example for one in other]
    for one in found:
        answer = one.example.answer
        assert len(answer) == 9 or answer[-1] == 2
        assert 2 not in answer[:-1]
        packed = pack([[*one.example.prompt, *answer]])
        with torch.no_grad(), without_adapters(model):
            logs = model(packed).log_softmax(-1)[len(one.example.prompt) - 1 : -1]
        torch.testing.assert_close(one.logs, logs.topk(TOP, -1).values, rtol=1e-4, atol=1e-4)
        chosen = logs.gather(-1, torch.tensor(answer).unsqueeze(-1)).sum()
        assert one.loss == pytest.approx(-float(chosen), rel=1e-4)


def test_answering_stops_when_it_is_asked_to(model: Decoder) -> None:
    turns = iter([True, True, False])
    found = recall(model, PROMPTS, ends=frozenset(), length=9, seed=1, going_on=lambda: next(turns, False))
    assert {len(one.example.answer) for one in found} == {2}


def test_divergence_is_zero_at_first_and_exact_where_all_is_kept(model: Decoder, tmp_path: Path) -> None:
    found = recall(model, PROMPTS, ends=frozenset(), length=5, seed=1)
    examples = [one.example for one in found]
    with torch.no_grad(), without_adapters(model):
        before = [model(pack([[*one.prompt, *one.answer]])).log_softmax(-1) for one in examples]
    rows = rows_of(model, 1, examples, tmp_path, shared=0)
    numbers = list(range(len(found)))
    assert abs(float(divergence(rows, numbers, found, 30).detach())) < 1e-5
    stir(model)
    all_kept = []
    for one, logs in zip(found, before, strict=True):
        best = logs[len(one.example.prompt) - 1 : -1].topk(VOCABULARY, -1)
        all_kept.append(Recalled(one.example, best.indices.int(), best.values, one.loss))
    exact = []
    for example, logs in zip(examples, before, strict=True):
        with torch.no_grad():
            now = model(pack([[*example.prompt, *example.answer]])).log_softmax(-1)
        part = slice(len(example.prompt) - 1, -1)
        exact.append(torch.nn.functional.kl_div(now[part], logs[part], log_target=True, reduction="sum"))
    whole = float(torch.stack(exact).sum()) / 30
    assert whole > 0.01
    assert float(divergence(rows, numbers, all_kept, 30).detach()) == pytest.approx(whole, rel=1e-3)
    assert 0 < float(divergence(rows, numbers, found, 30).detach()) <= whole


def gradients(
    model: Decoder, rows_shared: int, examples: list[Example], folder: Path
) -> tuple[float, Tensor]:
    """Loss and gradient of all the examples."""
    rows = rows_of(model, 1, examples, folder, shared=rows_shared)
    loss = supervised(rows, range(len(examples)), 1)
    torch.autograd.backward(loss)
    return float(loss.detach()), taken(parameters(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_beginning_computed_once_changes_no_gradient(family: str, tmp_path: Path) -> None:
    """Longer than gemma3's window, so that some sequences see a part of it only."""
    model = load_model(write_tiny(tmp_path / "m.gguf", family, kind=GGMLType.Q8_0))
    attach(model, LoRAOptions(rank=4))
    stir(model)
    examples = copying(7, front=[1, *range(260, 290)])
    assert common_beginning(examples) == 31
    plain_loss, plain = gradients(model, 0, examples, tmp_path)
    for shared in (5, 31):
        loss, gradient = gradients(model, shared, examples, tmp_path)
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_a_common_beginning_never_reaches_an_answer() -> None:
    same = [Example([5, 6, 7], [8, 2]), Example([5, 6, 7], [9, 2]), Example([5, 6], [7, 2])]
    assert common_beginning(same) == 1
    assert common_beginning([Example([5], [6]), Example([5], [7])]) == 0
    assert common_beginning(same[:1]) == 0
    assert common_beginning([Example([5, 6], [7]), Example([6, 5], [7])]) == 0


def test_importance_is_where_answers_depend_on_and_moving_there_costs(model: Decoder, tmp_path: Path) -> None:
    stir(model)
    rows = rows_of(model, 1, copying(8), tmp_path, shared=0)
    layers = [[layer.a, layer.b] for _, layer in adapted(model)]
    importance = Importance(rows, layers, tokens=8)
    weights = torch.cat([weight.flatten() for weight in importance.weights])
    assert float(weights.mean()) == pytest.approx(1, rel=1e-4)
    assert float(weights.min()) >= 0 and float(weights.max()) > 10
    assert float(importance.gradient().abs().max()) == 0
    trained = parameters(model)
    trained[0].data.add_(1.0)
    moved = importance.gradient()[: trained[0].numel()]
    torch.testing.assert_close(moved, weights[: trained[0].numel()], rtol=1e-4, atol=1e-4)


def test_the_weight_grows_over_the_budget_and_comes_back(model: Decoder, tmp_path: Path) -> None:
    found = recall(model, PROMPTS, ends=frozenset(), length=5, seed=1)
    rows = rows_of(model, 1, [one.example for one in found], tmp_path, shared=0)
    layers = [[layer.a, layer.b] for _, layer in adapted(model)]
    task = Task(name="t", model="", output="", keeping=Keeping(weight=1.0, budget=1e-4))
    keeper = Keeper(rows, found, None, layers, task)
    calm = keeper.step()
    assert float(calm.gradient.norm()) < 1e-3 and keeper.state()["weight"] == 1.0
    stir(model)
    for _ in range(40):
        kept = keeper.step()
    high = keeper.state()["weight"]
    assert high > 5 and float(kept.gradient.norm()) > 0 and kept.loss > 0
    stir(model, size=0.0)
    for _ in range(200):
        keeper.step()
    assert keeper.state()["weight"] == 1.0
    restored = Keeper(rows, found, None, layers, task)
    restored.restore(keeper.state())
    assert restored.step().loss == keeper.step().loss


def test_gradients_go_out_and_come_back(model: Decoder) -> None:
    trained = parameters(model)
    wanted = torch.arange(sum(parameter.numel() for parameter in trained), dtype=torch.float32)
    give(trained, wanted)
    assert torch.equal(taken(trained), wanted)
    assert float(taken(trained).abs().max()) == 0
