"""A checkpoint is whole, or it is refused in words."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from lichen.adapters import checkpoint
from lichen.errors import TrainingError


def test_a_damaged_checkpoint_is_refused_and_a_hostile_one_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    assert checkpoint.load(path, "x") is None
    checkpoint.save(path, {"identity": "x", "values": torch.arange(9)})
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainingError, match="cannot be read"):
            checkpoint.load(path, "x")

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "run",)

    torch.save({"version": 1, "identity": "x", "hostile": Hostile()}, path)
    with pytest.raises(TrainingError, match="cannot be read"):
        checkpoint.load(path, "x")
    assert not (tmp_path / "run").exists()
    checkpoint.save(path, {"identity": "x", "version": 99})
    with pytest.raises(TrainingError, match="version 99"):
        checkpoint.load(path, "x")


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"identity": "x", "step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # more fails, as on a full disk
    try:
        with pytest.raises(TrainingError, match=r"c\.pt cannot be written"):
            checkpoint.save(path, {"identity": "x", "step": 2, "values": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [one.name for one in tmp_path.iterdir()] == ["c.pt"]
    stored = checkpoint.load(path, "x")
    assert stored is not None and stored["step"] == 1
