"""The bench over the native library, on the default model cut to a few layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lichen.devices.curves import Fingerprint
from lichen.devices.fingerprint import CHUNKS, WIDTHS, Task, tasks
from lichen.devices.schedule import Progress
from lichen.errors import ConfigError, LichenError, ModelFileError
from lichen.quant.cut import layer_count, types_of, write_cut
from lichen.quant.gguf import open_gguf
from lichen.runtime import measuring, native
from lichen.runtime.fingerprints import CACHE_FOLDER, SCRATCH_FOLDER, take_fingerprint
from lichen.runtime.measuring import NativeBench, lengths
from tests.models.tiny_models import write_tiny


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """All tasks of one thread, with one step a sample and at most four layers."""
    monkeypatch.setattr(measuring, "SAMPLE_S", 0.0)
    monkeypatch.setattr(measuring, "LONG", 4)
    return tasks(1, kv_types=["f16"], depth=CHUNKS[0])


def test_how_long_the_lengths_are() -> None:
    assert lengths(30, 1) == (2, 10)
    assert lengths(6, 1) == (2, 6)
    assert lengths(2, 1) == (1, 2)
    assert lengths(1, 1) == (1,)
    assert lengths(80, 900_000_000) == (2, 4)


def test_a_cut_model_computes_as_the_whole_one_does(model_path: Path, tmp_path: Path) -> None:
    """Cut to all of its layers, a model is the same; to fewer, it says so everywhere."""
    with open_gguf(model_path) as file:
        whole = layer_count(file)
        write_cut(file, tmp_path / "all.gguf", types_of(file, None), whole)
        write_cut(file, tmp_path / "two.gguf", types_of(file, "q8_0"), 2)
        with pytest.raises(ModelFileError, match="cannot be cut to 31"):
            write_cut(file, tmp_path / "more.gguf", types_of(file, None), whole + 1)
        with pytest.raises(ConfigError, match="no type"):
            types_of(file, "q9")
        with open_gguf(tmp_path / "all.gguf") as same:
            assert same.tensors.keys() == file.tensors.keys()
            assert all(
                (same.tensors[name].data == tensor.data).all() for name, tensor in file.tensors.items()
            )
        with open_gguf(tmp_path / "two.gguf") as two:
            assert layer_count(two) == 2
            kept = {name for name in file.tensors if not name.startswith("blk.") or name[4:6] in ("0.", "1.")}
            assert two.tensors.keys() == kept
            assert {tensor.type.name for tensor in two.tensors.values()} == {"Q8_0", "F32"}
    model = native.Model(tmp_path / "two.gguf")
    model.close()


def test_a_fingerprint_of_the_default_model(model_path: Path, tmp_path: Path, quick: list[Task]) -> None:
    told: list[Progress] = []
    found = take_fingerprint(
        model_path, "d" * 64, tmp_path, wanted=quick, rounds=1, budget_s=0, progress=told.append
    )
    assert found is not None
    (curve,) = found.threads
    places = [place for place, _ in curve.batch.points]
    assert places == [*WIDTHS, *CHUNKS]
    assert (
        0
        < found.seconds(1, threads=1)
        < found.seconds(16, threads=1, rows=16)
        < found.seconds(512, threads=1)
    )
    assert found.cache("f16").cell_bytes == 30 * 2 * 3 * 64 * 2  # layers, K and V, heads, length, bytes
    assert 90e6 < found.weight_bytes < 110e6
    assert found.load_seconds > 0 and found.bandwidth > 1e8
    assert told[0].done == 0 and told[-1].done == told[-1].total
    assert not list((tmp_path / SCRATCH_FOLDER).iterdir())

    told.clear()  # it is known now
    again = take_fingerprint(model_path, "d" * 64, tmp_path, wanted=quick, rounds=1, progress=told.append)
    assert again == found and not told


def test_stopped_in_the_middle_and_continued(tmp_path: Path, quick: list[Task]) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", "llama", layers=4)
    seen: list[Task | None] = []

    def interrupt(now: Progress) -> None:
        if now.done == 8:
            raise KeyboardInterrupt
        seen.append(now.task)

    def take(stopped: bool = False, progress: Callable[[Progress], None] = interrupt) -> Fingerprint | None:
        return take_fingerprint(
            *(model, "e" * 64, tmp_path),
            layout="f16",
            wanted=quick,
            rounds=1,
            stopped=lambda: stopped,
            progress=progress,
        )

    with pytest.raises(KeyboardInterrupt):
        take()
    assert not list((tmp_path / SCRATCH_FOLDER).iterdir())
    assert len(list((tmp_path / CACHE_FOLDER).iterdir())) == 1
    first = len(seen)
    assert take(stopped=True) is None
    seen.clear()
    found = take(progress=lambda now: seen.append(now.task))
    assert found is not None and found.layout == "f16"
    assert len(seen) == len(quick) - first + 1  # and one that says that all is done


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGUF? no.")
    with pytest.raises(LichenError):
        NativeBench(tmp_path / "text.gguf", scratch=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.gguf"]
