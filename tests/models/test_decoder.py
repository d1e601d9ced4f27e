"""Packed equals separate, cached equals full, restarted equals whole; losses and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lichen.errors import RequestError
from lichen.models import loss as losses
from lichen.models.attention import KVCache
from lichen.models.decoder import Decoder
from lichen.models.gate import Activation, gated
from lichen.models.load import load_model
from lichen.models.norm import RMSNorm
from lichen.models.packing import Packed, pack
from lichen.models.rope import Pairs, Rope
from lichen.quant.formats import GGMLType
from lichen.quant.linear import QuantLinear
from tests.models.test_families import text
from tests.models.tiny_models import FAMILIES, VOCABULARY, write_tiny


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    layers = 7 if request.param == "gemma3" else 3
    return load_model(write_tiny(tmp_path / "m.gguf", request.param, layers=layers, kind=GGMLType.Q8_0))


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_equals_separate(model: Decoder) -> None:
    sequences = [text(length, seed=length) for length in (40, 40, 1, 70, 3, 3, 3)]
    together = pack(sequences).split(model(pack(sequences)))
    for sequence, logits in zip(sequences, together, strict=True):
        assert close(logits, model(pack([sequence])))


@torch.no_grad()
def test_cache_equals_full(model: Decoder) -> None:
    first, second = text(80), text(50, seed=2)
    cache = KVCache(2)
    steps = [(0, 30, 0, 7), (30, 31, 7, 8), (31, 60, 8, 9), (60, 79, 9, 49), (79, 80, 49, 50)]
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a, b, c, d in steps:
        step = pack([first[a:b], second[c:d]])
        for output, piece in zip(outputs, step.split(model(step, cache=cache)), strict=True):
            output.append(piece)
    assert cache.lengths == [80, 50]
    for sequence, pieces in ((first, outputs[0]), (second, outputs[1])):
        assert close(torch.cat(pieces), model(pack([sequence])))


@torch.no_grad()
def test_cache_goes_back(model: Decoder) -> None:
    sequence, cache = text(40), KVCache(1)
    model(pack([[*sequence[:35], 5, 6]]), cache=cache)
    cache.truncate(0, 35)
    assert close(model(pack([sequence[35:]]), cache=cache), model(pack([sequence]))[35:])


@torch.no_grad()
def test_restart_from_every_layer(model: Decoder) -> None:
    packed = pack([text(33), text(20, seed=3)])
    layers = range(len(model.blk) + 1)
    states = model.hidden_states(packed, layers)
    whole = model(packed)
    for layer in layers:
        assert torch.equal(model.logits(model.run(states[layer], packed, start=layer)), whole)
    assert torch.equal(states[0], model.embed(packed))


@torch.no_grad()
def test_logits_at_some_positions(model: Decoder) -> None:
    packed, positions = pack([text(20)]), torch.tensor([3, 19])
    assert close(model(packed, positions=positions), model(packed)[positions])


def test_nothing_is_trainable_at_first(model: Decoder) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(pack([text(4)])).requires_grad


def test_gradients_equal_a_dense_model(model: Decoder) -> None:
    """Through every block, with the norms trained as well: the gradient of the embedded text."""
    packed = pack([text(30), text(11, seed=4)])
    targets = torch.randint(0, VOCABULARY, (41,))

    def gradients() -> list[Tensor]:
        for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
            norm.weight.requires_grad_()
            norm.weight.grad = None
        hidden = model.embed(packed).requires_grad_()
        logits = model.logits(model.run(hidden, packed))
        torch.autograd.backward(functional.cross_entropy(logits, targets))
        found = [hidden.grad, *(parameter.grad for parameter in model.parameters())]
        return [gradient for gradient in found if gradient is not None]

    quantized = gradients()
    for block in model.blocks:
        for name, module in list(block.named_children()):
            if isinstance(module, QuantLinear):
                setattr(block, name, module.dense().requires_grad_(False))
    dense = gradients()
    assert len(quantized) == len(dense) > 5
    for found, expected in zip(quantized, dense, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_cross_entropy_in_parts(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack([text(30)])
    positions, targets = torch.tensor([2, 9, 10, 28, 29]), torch.tensor([7, 8, 9, 10, 11])
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * VOCABULARY * 2)  # two positions a part
    hidden = model.run(model.embed(packed), packed).requires_grad_()
    model.output_norm.weight.requires_grad_()
    output = model.output.dense()
    model.register_module("output", output)
    trained = [hidden, model.output_norm.weight, output.weight]
    found = losses.cross_entropy(model, hidden, positions, targets, weights) / 3
    plain = functional.cross_entropy(model.logits(hidden, positions), targets, reduction="none") @ weights / 3
    assert torch.allclose(found, plain, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, trained), torch.autograd.grad(plain, trained), strict=True
    ):
        assert close(one, other)
    with torch.no_grad():
        assert torch.allclose(losses.cross_entropy(model, hidden, positions, targets, weights) / 3, plain)
    with pytest.raises(RequestError, match="0 positions"):
        losses.cross_entropy(model, hidden, positions[:0], targets[:0])


def test_parts_agree_with_autograd() -> None:
    """The lean gradients of norm, gate and rope, held against finite differences."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 2, 8, generator=generator, requires_grad=True) for _ in range(2))
    norm = RMSNorm(torch.linspace(0.5, 2, 8), 1e-5)
    norm.weight.requires_grad_()
    plain = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    seed = torch.randn(3, 2, 8, generator=generator)
    inputs = [x, norm.weight]
    for one, other in zip(
        torch.autograd.grad(norm(x), inputs, seed), torch.autograd.grad(plain, inputs, seed), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)
    for activation, function in (
        (Activation.SILU, functional.silu),
        (Activation.GELU_TANH, nn.GELU(approximate="tanh")),
    ):
        lean = torch.autograd.grad(gated(x, y, activation), [x, y], seed)
        for one, other in zip(lean, torch.autograd.grad(function(x) * y, [x, y], seed), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    for pairs in Pairs:
        table = Rope(pairs=pairs, dims=8, base=100.0, magnitude=1.5).table(torch.tensor([0, 5, 9]), None)
        (gradient,) = torch.autograd.grad(table.turn(x), [x], seed)
        # a linear map: <turn(x), seed> = <x, gradient>
        assert torch.allclose((table.turn(x) * seed).sum(), (x * gradient).sum(), rtol=1e-4)
        assert torch.allclose(table.turn(x)[0], 1.5 * x[0], atol=1e-6)


def test_wrong_calls_are_refused(model: Decoder) -> None:
    packed = pack([text(4)])
    hidden = model.embed(packed)
    for start, stop in ((2, 1), (-1, 1), (0, 99)):
        with pytest.raises(RequestError, match="Hidden states"):
            model.run(hidden, packed, start=start, stop=stop)
    with pytest.raises(RequestError, match="all layers"):
        model.run(hidden, packed, start=1, cache=KVCache(1))
    with pytest.raises(RequestError, match="hidden states"):
        model.hidden_states(packed, [])
    with pytest.raises(RequestError, match="at least one"):
        pack([[1], []])
    with pytest.raises(RequestError, match="at least one"):
        pack([])
    with pytest.raises(RequestError, match="do not make up"):
        Packed(torch.tensor([1, 2]), (3,))
