"""What stands around the conversions: the library that is found, its layout, threads, forks and torch."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.errors import EngineError
from lichen.quant import ggml
from lichen.quant.ggml import GGMLType, dequantize
from tests.quant.test_ggml import numbers, stored


class OtherGGML:
    """A library whose table of types is laid out or numbered in another way."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return getattr(ggml._library, name)

    def ggml_get_type_traits(self, kind: int) -> Any:
        real = ggml._library.ggml_get_type_traits(kind).contents
        copy = ggml.Traits.from_buffer_copy(real)
        for field, content in self._changes.items():
            setattr(copy, field, content)
        return ctypes.pointer(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"blck_size": 64},
        {"type_size": 17},
        {"is_quantized": False},
        {"type_name": None},
        {"to_float": ggml._traits[GGMLType.Q8_0].to_float},
        {"from_float_ref": ggml._traits[GGMLType.Q8_0].from_float_ref},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_library_with_another_layout_is_refused(changes: dict[str, Any]) -> None:
    ggml.read_traits(OtherGGML(), GGMLType.Q4_0)
    with pytest.raises(EngineError, match="differs from what lichen was written for"):
        ggml.read_traits(OtherGGML(**changes), GGMLType.Q4_0)


def test_a_library_that_is_missing_or_older_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(EngineError, match="has no libggml-base"):
        ggml._library_path()
    (tmp_path / "libggml-base.so").write_bytes(b"not a library")
    with pytest.raises(EngineError, match="cannot be used"):
        ggml._load(tmp_path / "libggml-base.so")


def test_neither_torch_nor_the_bindings_are_imported() -> None:
    code = (
        "import sys, lichen.quant.gguf; assert 'lichen.quant.ggml' not in sys.modules;"
        "import lichen.quant.ggml; assert not {'torch', 'llama_cpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_many_threads_convert_at_once() -> None:
    source = numbers(rows=40)
    expected = {
        kind: stored(kind, source, threads=1) for kind in (GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.IQ3_S)
    }

    def convert(turn: int) -> bool:
        kind = list(expected)[turn % 3]
        data = stored(kind, source, threads=3)
        out = np.empty_like(source)
        dequantize(kind, data, out, threads=3)
        return np.array_equal(data, expected[kind])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(convert, range(24)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes are forked")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = (
        "import os, numpy as np\n"
        "from lichen.quant.ggml import GGMLType, quantize\n"
        "source, out = np.ones((600, 512), np.float32), np.empty((600, 288), np.uint8)\n"
        "quantize(GGMLType.Q4_0, source, out, threads=3)\n"
        "child = os.fork()\n"
        "quantize(GGMLType.Q4_0, source, out, threads=3)\n"
        "child or os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=30)


def test_torch_tensors_are_converted_in_place() -> None:
    torch = pytest.importorskip("torch")
    source = numbers()
    data = torch.from_numpy(stored(GGMLType.Q8_0, source))
    out = torch.empty(source.shape)
    dequantize(GGMLType.Q8_0, data.numpy(), out.numpy())
    assert np.allclose(out.numpy(), source, atol=0.01)
