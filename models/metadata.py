"""Strict reading of what a GGUF says about a model: a typed key, its default, or an error.

A key that changes what a model computes and is not understood must not pass in silence: training would
go on, against the wrong model. So every key of the architecture must have been read in the end, or stand
in `HARMLESS`. Keys are given without the architecture: "rope.freq_base" reads "llama.rope.freq_base".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lichen.errors import ModelFileError
from lichen.quant.gguf_values import Value

# Keys that no forward pass depends on, or that repeat what the tensors' shapes say.
HARMLESS = frozenset(
    {
        "context_length",
        "vocab_size",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "pooling_type",
        "mm.tokens_per_image",
    }
)


class Metadata:
    """The metadata of one file, and which keys of its architecture were read."""

    def __init__(self, values: Mapping[str, Value], file_name: str) -> None:
        self._values, self._file_name = values, file_name
        told = values.get("general.architecture")
        architecture = told.content if told is not None else None
        if not isinstance(architecture, str) or not architecture:
            raise self.fault(f"general.architecture is {architecture!r}, not a name")
        self.architecture = architecture
        self._read: set[str] = set()

    def fault(self, what: str) -> ModelFileError:
        """The error that says what is wrong with this file."""
        return ModelFileError(f"{self._file_name} cannot be used for training: {what}.")

    def has(self, key: str) -> bool:
        """Whether the file has a key of the architecture."""
        return self._full(key) in self._values

    def integer(self, key: str, default: int | None = None, *, limit: int = 1 << 24) -> int:
        """A whole number from 1 to `limit`. Raises ModelFileError for a missing or wrong one."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.fault(f"{self._full(key)} is {_shown(value)}, not a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above 0, or 0 where `zero` allows it. Raises ModelFileError."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(f"{self._full(key)} is {_shown(value)}, not a number")
        if value < 0 or (value == 0 and not zero):
            raise self.fault(f"{self._full(key)} is {value!r}, but must be above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text. Raises ModelFileError."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.fault(f"{self._full(key)} is {_shown(value)}, not a text")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false. Raises ModelFileError."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"{self._full(key)} is {_shown(value)}, neither true nor false")
        return value

    def refuse(self, key: str, reason: str, *, unless: tuple[Any, ...] = ()) -> None:
        """Raise ModelFileError if the file has this key with a value that is not one of `unless`."""
        if self.has(key) and self._value(key, None) not in unless:
            value = self._values[self._full(key)].content
            raise self.fault(f"{self._full(key)} is {value!r}: {reason}")

    def refuse_unread(self) -> None:
        """Raise ModelFileError if the file says more about the model than was read."""
        prefix = f"{self.architecture}."
        unread = sorted(
            key
            for key in self._values
            if key.startswith(prefix) and key not in self._read and key.removeprefix(prefix) not in HARMLESS
        )
        if unread:
            raise self.fault(f"lichen does not know what {', '.join(unread[:5])} would change")

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _value(self, key: str, default: Any) -> Any:
        full = self._full(key)
        self._read.add(full)
        value = self._values.get(full)
        if value is not None:
            return value.content
        if default is None:
            raise self.fault(f"{full} is missing")
        return default


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"
