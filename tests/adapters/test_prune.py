"""Pruning changes nothing where nothing is taken out, keeps its bound elsewhere, and its files are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lichen.adapters.lora import adapted, attach
from lichen.adapters.lora_file import settle_adapter, write_adapter
from lichen.adapters.prune import components, prune
from lichen.adapters.task import Example, LoRAOptions
from lichen.errors import ModelFileError
from lichen.models.decoder import Decoder
from lichen.models.load import load_model
from lichen.models.packing import pack
from lichen.quant.formats import GGMLType
from tests.adapters.tiny_rows import copying, rows_of, stir
from tests.models.reference import F32, distance, reference_logits
from tests.models.tiny_models import write_tiny

OPTIONS = LoRAOptions(rank=6, alpha=9)
TEXT = [1, *range(260, 300)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two layers of random weights."""
    return write_tiny(tmp_path / "m.gguf", "llama", kind=GGMLType.F16)


def adapted_model(path: Path) -> Decoder:
    """With an adapter on the upper layer that changes much."""
    model = load_model(path)
    attach(model, OPTIONS)
    stir(model, 0.1)
    return model


def logits(model: Decoder) -> Tensor:
    """Of a made-up text."""
    with torch.no_grad():
        return model(pack([TEXT]))  # type: ignore[no-any-return]


def own(model: Decoder, seed: int = 0) -> list[Example]:
    """Questions with what the model answers, so that its adapter is worth something."""
    found = []
    for example in copying(6, seed):
        row = list(example.prompt)
        for _ in range(3):
            with torch.no_grad():
                row.append(int(model(pack([row]))[-1].argmax()))
        found.append(Example(example.prompt, row[-3:]))
    return found


def test_nothing_allowed_nothing_changed(path: Path, tmp_path: Path) -> None:
    model = adapted_model(path)
    before = logits(model)
    rows = rows_of(model, 1, copying(6), tmp_path, shared=0)
    report = prune(model, [rows], allowed=-1.0, tokens=64)
    assert set(report.ranks.values()) == {6} and report.bytes_after == report.bytes_before
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_as_much_goes_as_the_loss_allows(path: Path, tmp_path: Path) -> None:
    reports = []
    for allowed in (0.01, 0.1, 1000.0):
        model = adapted_model(path)
        probes = [rows_of(model, 1, own(model, seed), tmp_path, shared=0) for seed in (0, 1)]
        report = prune(model, probes, allowed=allowed, tokens=64)
        for old, new in zip(report.losses_before, report.losses_after, strict=True):
            assert new <= old * (1 + allowed)
        reports.append(report)
    sizes = [report.bytes_after for report in reports]
    assert sizes[0] > sizes[1] > sizes[2] == 0
    assert len(set(reports[1].ranks.values())) > 1  # of each matrix its own


def test_components_are_the_product_and_the_cut_energy_is_the_error() -> None:
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 40, generator=source), torch.randn(30, 5, generator=source)
    a[4] = a[3]  # one less than it seems
    rows, columns = components(a, b)
    assert len(rows) == 4
    torch.testing.assert_close(columns @ rows, b @ a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows @ rows.t(), torch.eye(4), rtol=1e-4, atol=1e-5)
    energy = columns.square().sum(0)
    assert energy.tolist() == sorted(energy.tolist(), reverse=True)
    error = (columns[:, :2] @ rows[:2] - b @ a).square().sum()
    torch.testing.assert_close(error, energy[2:].sum(), rtol=1e-3, atol=1e-3)
    assert len(components(a, torch.zeros(30, 5))[0]) == 0


def test_llama_cpp_reads_ranks_of_their_own(path: Path, tmp_path: Path) -> None:
    model = adapted_model(path)
    rows = rows_of(model, 1, own(model), tmp_path, shared=0)
    report = prune(model, [rows], allowed=0.05, tokens=64)
    assert len(set(report.ranks.values())) > 1
    write_adapter(model, tmp_path / "a.gguf", OPTIONS, name="test", base="b1" * 32)
    theirs = reference_logits(path, TEXT, kv_type=F32, adapter=tmp_path / "a.gguf")
    assert distance(logits(model), theirs).mean <= 1e-5


def test_a_second_lesson_stands_on_the_first_and_leaves_its_directions_alone(
    path: Path, tmp_path: Path
) -> None:
    old = adapted_model(path)
    write_adapter(old, tmp_path / "a.gguf", OPTIONS, name="test", base="b1" * 32)
    model = load_model(path)
    attach(model, OPTIONS, seed=5)
    settle_adapter(model, tmp_path / "a.gguf")
    torch.testing.assert_close(logits(model), logits(old), rtol=1e-4, atol=1e-4)
    for (_, new), (_, first) in zip(adapted(model), adapted(old), strict=True):
        assert float((new.a.detach() @ first.a.detach().t()).abs().max()) < 1e-5
        new.a.data.add_(first.a.data)
        new.step_aside()
        assert float((new.a.detach() @ first.a.detach().t()).abs().max()) < 1e-5
    stir(model, seed=7)
    write_adapter(model, tmp_path / "b.gguf", OPTIONS, name="test", base="b1" * 32)
    theirs = reference_logits(path, TEXT, kv_type=F32, adapter=tmp_path / "b.gguf")
    assert distance(logits(model), theirs).mean <= 1e-5
    assert distance(logits(model), logits(old)).mean > 1e-3


def test_what_cannot_be_stood_on_is_refused(path: Path, tmp_path: Path) -> None:
    model = load_model(path)
    attach(model, LoRAOptions(rank=2, targets=("attn_q",)))
    with pytest.raises(ModelFileError, match="no LoRA adapter"):
        settle_adapter(model, write_tiny(tmp_path / "n.gguf", "llama"))
    write_adapter(adapted_model(path), tmp_path / "a.gguf", OPTIONS, name="test", base="b1" * 32)
    with pytest.raises(ModelFileError, match="not adapted here"):
        settle_adapter(model, tmp_path / "a.gguf")
