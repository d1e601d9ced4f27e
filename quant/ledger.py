"""Measurements that took time, kept in a file one line each, so that an interrupted run goes on.

What they depend on (model, text, importance, versions) is the name of the file, a digest: where any of it
differs, nothing old is found. A line that a crash cut off is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from pathlib import Path

from lichen.errors import StoreError

VERSION = 1  # of what a number means; a change makes all old ones unknown


def digest(*parts: str | bytes) -> str:
    """sha256 over parts, each with its length, so that they cannot run into each other."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


class Ledger:
    """Numbers by key. folder: None keeps them in memory only. Raises StoreError when it cannot be written."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._path = folder / f"{name}.v{VERSION}.jsonl" if folder is not None else None
        self._known: dict[str, float] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if lines:  # a line that was cut off must not join the next one
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self._path} cannot be read or written.", hint="Remove it.") from error
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                key, value = json.loads(line)
                if isinstance(key, str) and math.isfinite(value):
                    self._known[key] = float(value)

    def get(self, key: str) -> float | None:
        """What was measured."""
        return self._known.get(key)

    def put(self, key: str, value: float) -> None:
        """Keep a number; it is in the file when this returns."""
        self._known[key] = value
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}.") from error
