"""What the native library was compiled for, and what of this processor it leaves unused."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Feature of the processor, as Linux names it -> as llama_print_system_info does. Source: ggml-cpu.cpp.
_NATIVE_NAMES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "bmi2": "BMI2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx_vnni": "AVX_VNNI",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}
_SWITCH = re.compile(r"\b([A-Z][A-Z0-9_]*) = (\d{1,6})\b")


def compiled_for(system_info: str) -> frozenset[str]:
    """Names of what is switched on in a line such as "CPU : AVX2 = 1 | F16C = 1 | AVX512 = 0"."""
    return frozenset(name for name, value in _SWITCH.findall(system_info) if int(value))


def unused_features(system_info: str, flags: Iterable[str]) -> tuple[str, ...]:
    """Features that speed models up, that the processor has, and that the library was not compiled for.

    Empty for a line that names none: then nothing is known.
    """
    compiled = compiled_for(system_info)
    if not compiled:
        return ()
    flagged = frozenset(flags)
    return tuple(
        native for flag, native in _NATIVE_NAMES.items() if flag in flagged and native not in compiled
    )
