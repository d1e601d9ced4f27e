"""llama.cpp's own quantizer, `llama_model_quantize`, called through its bindings: what llama-quantize runs."""

from __future__ import annotations

import ctypes
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.peer import BenchError
from lichen.quant.importance import Importance
from lichen.runtime import native

# name -> (number in llama.h's enum llama_ftype, whether it is one type for all, as of llama-quantize --pure)
MIXTURES = {
    "Q2_0": (41, False), "Q2_K_pure": (10, True), "Q3_K_pure": (12, True), "IQ4_XS_pure": (30, True),
    "Q4_0_pure": (2, True), "Q2_K": (10, False), "IQ4_XS": (30, False), "Q3_K_M": (12, False),
    "Q4_K_S": (14, False), "Q4_K_M": (15, False), "Q5_0": (8, False),
}  # fmt: skip


def llama_quantize(
    source: Path, target: Path, mixture: str, importance: Importance | None, *, threads: int
) -> None:
    """Write `target` as one of MIXTURES, with or without an importance matrix. Raises BenchError."""
    logging.getLogger("lichen.native").setLevel(logging.ERROR)  # it tells of every fallback of a type
    lib = native._library_with_log()
    params = lib.llama_model_quantize_default_params()
    params.nthread, (params.ftype, params.pure) = threads, MIXTURES[mixture]
    kept: list[Any] = []
    if importance is not None:
        rows = (lib.llama_model_imatrix_data * (len(importance) + 1))()  # ends with an empty one
        for row, (name, means) in zip(rows, importance.items(), strict=False):
            numbers = np.ascontiguousarray(means, np.float32).reshape(-1)
            kept.append(numbers)
            row.name, row.size = name.encode(), numbers.size
            row.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
    with tempfile.TemporaryDirectory() as folder:  # llama.cpp 0.3.36 wants a name that ends in .gguf
        link = Path(folder) / "source.gguf"
        link.symlink_to(source.resolve())
        made = Path(folder) / "made.gguf"
        code = lib.llama_model_quantize(str(link).encode(), str(made).encode(), ctypes.byref(params))
        if code != 0 or not made.is_file():
            raise BenchError(f"llama.cpp could not quantize {source.name} to {mixture} (code {code}).")
        shutil.move(made, target)
