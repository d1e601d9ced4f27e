"""Buffers of a caller as arrays over the same memory: numpy's, torch's by `.numpy()`, bytes and mappings.

Nothing is copied and nothing converted: what does not fit as it is, is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lichen.errors import TensorError


def _array(buffer: Any, name: str, *, writable: bool) -> npt.NDArray[Any]:
    """The buffer as an array over the same memory."""
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError, BufferError):
        raise TensorError(
            f"{name} has no buffer: it is of the type {buffer.__class__.__name__}.",
            hint="Pass a numpy array, or tensor.numpy() of a tensor on the CPU.",
        ) from None
    if not view.c_contiguous:
        raise TensorError(f"{name} is not contiguous.", hint="Pass a contiguous copy of it.")
    if writable and view.readonly:
        raise TensorError(f"{name} is read-only, but the result goes there.")
    return np.asarray(view)


def stored_bytes(buffer: Any, name: str, *, writable: bool = False) -> npt.NDArray[np.uint8]:
    """The buffer as bytes, in the shape that it has; a last dimension of wider items grows accordingly.

    Raises TensorError unless it is contiguous and, where the result goes there, writable.
    """
    array = _array(buffer, name, writable=writable)
    return array.view(np.uint8) if array.ndim else array.reshape(1).view(np.uint8)


def float_numbers(buffer: Any, name: str, *, writable: bool) -> npt.NDArray[np.float32]:
    """The buffer as float32, in the shape that it has. Raises TensorError unless it is just that."""
    array = _array(buffer, name, writable=writable)
    if array.dtype != np.float32 or not array.flags.aligned:
        raise TensorError(f"{name} holds {array.dtype}, but must hold aligned float32.")
    return array
