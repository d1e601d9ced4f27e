"""What the GPU kernels refuse, whether they compile for people's cards, and their products, interpreted."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.errors import EngineError, TensorError
from lichen.quant.formats import GGMLType
from lichen.quant.triton_kernels import (
    PLAIN_TILES,
    SUPPORTED,
    TENSOR_CORE_TILES,
    Tile,
    matmul,
    matmul_transposed,
    supports,
    tile_sizes,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it has no wheels here)")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WEIGHTS = torch.zeros(4, 36, dtype=torch.uint8)  # Q4_0, 64 columns
X = torch.zeros(2, 64)


@needs_triton
def test_products_in_the_interpreter() -> None:
    """`triton_interpreted.py` in its own process, since the interpreter takes hold of all of triton."""
    tests = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- where it runs ------------------------------------------------------------------------------


def test_the_cpu_is_left_to_ggml() -> None:
    assert not supports(GGMLType.Q4_0, CPU)
    with pytest.raises(TensorError if HAS_TRITON else EngineError):
        matmul(X, WEIGHTS, GGMLType.Q4_0, 4, 64)


@needs_triton
def test_cards_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert all(supports(kind, GPU) for kind in SUPPORTED)
    assert not any(supports(kind, GPU) for kind in set(GGMLType) - SUPPORTED)
    assert not supports(GGMLType.Q4_0, torch.device("mps"))
    capability = (6, 1)
    assert not supports(GGMLType.Q4_0, GPU)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert supports(GGMLType.Q4_0, GPU)


def test_without_triton_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not supports(GGMLType.Q4_0, GPU)
    with pytest.raises(EngineError, match=r"triton.*lichen\[gpu\]"):
        matmul(X, WEIGHTS, GGMLType.Q4_0, 4, 64)


# ---- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": GGMLType.Q5_K, "columns": 256}, "Q5_K has no GPU kernel"),
        ({"type": 99}, "99 is the number of no tensor type"),
        ({"columns": 48}, "row of 48 elements cannot be Q4_0"),
        ({"columns": 0}, "row of 0 elements"),
        ({"columns": 96}, r"uint8 \[4, 54\], but the weights are uint8 \[4, 36\]"),
        ({"rows": 5}, r"uint8 \[5, 36\]"),
        ({"rows": -4}, r"uint8 \[-4, 36\]"),
        ({"weight_bytes": WEIGHTS.flatten()}, r"uint8 \[144\]"),
        ({"weight_bytes": WEIGHTS.to(torch.int8)}, "are int8"),
        ({"weight_bytes": torch.zeros(36, 4, dtype=torch.uint8).T}, "not contiguous"),
        ({"x": X.double()}, "x holds float64"),
        ({"x": X.to(torch.int32)}, "x holds int32"),
        ({"x": torch.zeros(2, 63)}, r"x has the shape \[2, 63\], but its last axis must have 64"),
        ({"x": torch.tensor(1.0)}, r"x has the shape \[\]"),
        ({"x": X.to("meta")}, "x lies on meta and the weights on cpu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ", ".join(value),
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "x": X,
        "weight_bytes": WEIGHTS,
        "type": GGMLType.Q4_0,
        "rows": 4,
        "columns": 64,
    } | change
    with pytest.raises(TensorError, match=message):
        matmul(**given)


def test_the_gradient_has_the_other_width() -> None:
    with pytest.raises(TensorError, match=r"dy has the shape \[2, 64\], but its last axis must have 4"):
        matmul_transposed(X, WEIGHTS, GGMLType.Q4_0, 4, 64)


# ---- compiled, on no GPU ----------------------------------------------------------------------------


def compiled(direction: str, kind: GGMLType, dtype: str, tile: Tile, capability: int) -> tuple[int, int]:
    """Compile one kernel for an NVIDIA card: bytes of shared memory, and of spilled registers a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lichen.quant import triton_tiles

    kernel = getattr(triton_tiles, direction)
    constants = {
        "DECODE": getattr(triton_tiles, f"decode_{kind.name.lower()}"),
        "WIDE": tile in PLAIN_TILES,
        **tile_sizes(direction, tile),
    }
    dense = {"x", "y", "dx", "dy"}
    signature = {
        name: f"*{dtype}" if name in dense else "*u8" if name == "weights" else "i32"
        for name in kernel.arg_names
    } | dict.fromkeys(constants, "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in {*dense, "weights", "rows", "columns"}
    }
    result = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(result.asm["cubin"])
        binary.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack, usage
    return result.metadata.shared, int(stack[1])


@needs_triton
@pytest.mark.parametrize("kind", sorted(SUPPORTED), ids=lambda kind: kind.name)
def test_kernels_compile_for_an_rtx_30(
    kind: GGMLType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for direction in ("forward", "backward"):
        shared, spilled = compiled(direction, kind, "fp16", TENSOR_CORE_TILES[0], 86)
        assert shared <= 48 * 1024
        assert spilled == 0


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("capability", "dtype", "tiles"),
    [
        (75, "fp16", PLAIN_TILES),
        (75, "bf16", PLAIN_TILES),
        (75, "fp32", PLAIN_TILES),
        (86, "fp32", PLAIN_TILES),
        (86, "fp16", TENSOR_CORE_TILES),
        (86, "bf16", TENSOR_CORE_TILES),
        (89, "fp32", PLAIN_TILES),
        (89, "fp16", TENSOR_CORE_TILES),
        (89, "bf16", TENSOR_CORE_TILES),
    ],
)
def test_every_tile_fits_rtx_20_30_and_40(
    capability: int, dtype: str, tiles: tuple[Tile, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for direction, kind, tile in itertools.product(("forward", "backward"), sorted(SUPPORTED), tiles):
        shared, spilled = compiled(direction, kind, dtype, tile, capability)
        assert shared <= 48 * 1024, (direction, kind.name, tile)
        assert spilled == 0, (direction, kind.name, tile)
