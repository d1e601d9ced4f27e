"""What a trainer's process tells: JSON lines in a file that only grows, so that anyone may watch.

After a resumption the steps since the last checkpoint come a second time; the later line counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from lichen.adapters.grading import Grade
from lichen.adapters.task import Checkpoint


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event"):
    """step: where it goes on, 0 for a new training; steps: of the whole; parameters: numbers it trains."""

    step: int
    steps: int
    parameters: int
    rate: float


class Measured(msgspec.Struct, frozen=True, tag="measured", tag_field="event"):
    """Losses in nats a token of held-out answers and of general ones; exact: share of held-out answers
    that greedy decoding gives word for word. None where there was nothing to measure on."""

    when: str
    loss: float | None = None
    exact: float | None = None
    general: float | None = None


class Stepped(msgspec.Struct, frozen=True, tag="step", tag_field="event"):
    """One step: tokens that went through the model a second, and the seconds that are left. kept: divergence
    from the model as it was, on general answers, in nats a token; None where none are replayed."""

    step: int
    epoch: int
    loss: float
    rate: float
    norm: float
    tokens_per_second: float
    left: float
    kept: float | None = None


class Compared(msgspec.Struct, frozen=True, tag="compared", tag_field="event"):
    """Grades of a new draft head and of the one before it, on answers that neither learned from; better:
    whether the new one is to be served."""

    new: Grade
    old: Grade | None
    better: bool


class Saved(msgspec.Struct, frozen=True, tag="saved", tag_field="event"):
    """A checkpoint is on the disk."""

    step: int


class Stopped(msgspec.Struct, frozen=True, tag="stopped", tag_field="event"):
    """It was asked to end early; the same command goes on from here."""

    step: int


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="event"):
    """It ended in an error, in one sentence."""

    error: str


class Finished(msgspec.Struct, frozen=True, tag="finished", tag_field="event"):
    """folder: of the adapter; seconds: of the last process; memory: its peak in bytes."""

    folder: str
    seconds: float
    memory: int


class Settled(msgspec.Struct, frozen=True, tag="settled", tag_field="event"):
    """What the gate decided after the training. checkpoint: which of its adapters is kept, and why the gate
    lets none serve, or nothing. losses: of the lesson in nats a token, by checkpoint."""

    checkpoint: Checkpoint
    losses: dict[str, float | None] = {}
    faults: tuple[str, ...] = ()


Event: TypeAlias = Started | Measured | Stepped | Compared | Saved | Stopped | Failed | Finished | Settled


class EventLog:
    """Appends events; each is one write, so that no reader sees lines mixed."""

    def __init__(self, path: Path) -> None:
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if cut:  # a full disk, or an end by power loss
            os.write(self._handle, b"\n")

    def __call__(self, event: Event) -> None:
        """Tell it, and when it happened: `at`, in seconds since 1970."""
        line = {**msgspec.to_builtins(event), "at": time.time()}
        os.write(self._handle, msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Nothing more comes from here."""
        os.close(self._handle)


class Told(NamedTuple):
    """line: its number in the file, from 0, which never changes; at: seconds since 1970."""

    line: int
    at: float
    event: Event


def told(path: Path) -> list[Told]:
    """Everything that a trainer has told so far, and when; lines that are none are left out.

    Steps that were taken again after a resumption stand there once, as they were in the end.
    """
    if not path.exists():
        return []
    found: list[Told] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            event, stamp = msgspec.json.decode(line, type=Event), msgspec.json.decode(line, type=_Stamp)
        except msgspec.MsgspecError:
            continue
        if isinstance(event, Started):
            found = [
                one for one in found if not (isinstance(one.event, Stepped) and one.event.step > event.step)
            ]
        found.append(Told(number, stamp.at, event))
    return found


class _Stamp(msgspec.Struct):
    at: float = 0.0


class EventReader:
    """Reads what comes behind a position; a line that is not whole yet waits."""

    def __init__(self, path: Path, *, whole: bool = False) -> None:
        """whole: from the beginning of the file, not from its end."""
        self._path = path
        self._position = path.stat().st_size if path.exists() and not whole else 0
        self._decoder = msgspec.json.Decoder(Event)

    def new(self) -> Iterator[Event]:
        """Events since the last call; lines that are none (of a newer lichen, or cut off) are left out."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            while (line := file.readline()).endswith(b"\n"):
                self._position += len(line)
                try:
                    yield self._decoder.decode(line)
                except msgspec.MsgspecError:
                    continue
