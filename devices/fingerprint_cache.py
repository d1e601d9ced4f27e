"""Samples on disk: one JSON file for each class of machines, model, layout and version of llama.cpp.

A file that is damaged, lies, or was written by another version of lichen is removed and measured again: it
is worth seconds, and never an error. Writing is whole or not at all (`lichen/durable.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from pathlib import Path

import msgspec

from lichen.devices.fingerprint import VERSION, Key, Record, Shape, Task, sound, values
from lichen.durable import write_file
from lichen.errors import StoreError

log = logging.getLogger("lichen.devices")

MAX_BYTES = 1 << 20  # of a file; real ones have some tens of thousands
MAX_SAMPLES = 1000  # of one task

_PLAIN = re.compile(r"[^A-Za-z0-9._]+")


class FingerprintCache:
    """Records below one folder, which is made when the first is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: Key, shape: Shape) -> Record:
        """What was measured before of this key; an empty record where nothing is kept that can be used.

        A record of other lengths than `shape` cannot be continued and is dropped.
        """
        record = self.find(key)
        if record is not None and record.shape == shape:
            return record
        return Record(key=key, shape=shape)

    def find(self, key: Key) -> Record | None:
        """The record of a key, complete or not; None for none. A bad file is removed."""
        path = self._path(key)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            _check(record, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # what msgspec raises is a ValueError, too
            log.warning("%s cannot be used (%s); it is measured again.", path.name, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return record

    def borrow(self, record: Record, tasks: list[Task]) -> None:
        """Take over what does not depend on the layout from records of the model's other layouts."""
        for path in sorted(self._folder.glob(f"{_stem(record.key, layout='')}*.json")):
            layout = path.name.removeprefix(_stem(record.key, layout="")).split("-")[0]
            other = self.find(msgspec.structs.replace(record.key, layout=layout))
            if other is None or other.shape.layers != record.shape.layers:
                continue
            for task in tasks:
                if task.shared and not record.count(task) and (samples := other.samples.get(task.key)):
                    record.samples[task.key] = list(samples)

    def save(self, record: Record) -> None:
        """Keep a record. Raises StoreError."""
        path = self._path(record.key)
        try:
            write_file(path, msgspec.json.encode(record))
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}.") from error

    def forget(self, key: Key) -> None:
        """Drop what is kept of a key. Raises StoreError."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._path(key)} cannot be removed: {error.strerror}.") from error

    def _path(self, key: Key) -> Path:
        return self._folder / f"{_stem(key)}-{_digest(key)}.json"


def _stem(key: Key, layout: str | None = None) -> str:
    """The readable part of a file's name."""
    plain = [_PLAIN.sub("_", part)[:20] for part in (key.hardware, key.model[:12], key.library)]
    return "-".join((*plain, _PLAIN.sub("_", key.layout if layout is None else layout)[:20]))


def _digest(key: Key) -> str:
    """What tells keys apart whose names look alike."""
    parts = "\0".join((key.hardware, key.model, key.layout, key.library))
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _check(record: Record, key: Key) -> None:
    """Raises ValueError for what this lichen did not write for this key."""
    lengths = len(record.shape.layers)
    if record.version != VERSION:
        raise ValueError(f"it was written by another version of lichen: {record.version}, not {VERSION}")
    if record.key != key:
        raise ValueError("it is of another model or machine")
    if not lengths or len(record.shape.layer_bytes) != lengths:
        raise ValueError("its shape is nonsense")
    for name, samples in record.samples.items():
        if len(samples) > MAX_SAMPLES or not all(
            sound(sample, values(name, record.shape)) for sample in samples
        ):
            raise ValueError(f"{name!r} holds what cannot be measured")
