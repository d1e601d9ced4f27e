"""Starts a trainer's process and follows it; imports no torch, so that the daemon may use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import msgspec

from lichen.adapters.events import Event, EventReader, Failed
from lichen.adapters.task import Examples, Task
from lichen.errors import TrainingError

TASK, EXAMPLES, EVENTS = "task.json", "examples.json", "events.jsonl"
CHECKPOINT, LOCK, OUTPUT = "checkpoint.pt", "lock", "trainer.log"
STOPPED = 3  # exit code of a training that was asked to end and can go on
POLL_S = 0.1


def prepare(folder: Path, task: Task, examples: Examples) -> None:
    """Write what the trainer reads; only its owner can read it.

    Raises TrainingError when it cannot be written or a trainer is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with filelock.FileLock(folder / LOCK, timeout=0):
            for name, content in ((EXAMPLES, examples), (TASK, task)):
                partial = folder / f".{name}.partial"
                partial.touch(mode=0o600)
                partial.write_bytes(msgspec.json.encode(content))
                partial.replace(folder / name)
    except filelock.Timeout:
        raise TrainingError(f"Another process trains in {folder} already.") from None
    except OSError as error:
        raise TrainingError(f"The folder {folder} cannot be written: {error.strerror}.") from error


class Training:
    """A running trainer. Iterate for its events; `stop` asks it to keep a checkpoint and end."""

    def __init__(self, folder: Path) -> None:
        """Start it in a prepared folder. It is in a session of its own: Ctrl-C does not reach it."""
        self.folder = folder
        self._reader = EventReader(folder / EVENTS)
        with (folder / OUTPUT).open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lichen.adapters.trainer", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __iter__(self) -> Iterator[Event]:
        """Events until it has ended. Blocks. Raises TrainingError when it failed or was killed."""
        failed = ""
        while True:
            ended = self.process.poll() is not None
            for event in self._reader.new():
                failed = event.error if isinstance(event, Failed) else failed
                yield event
            if ended:
                break
            time.sleep(POLL_S)
        if self.process.returncode not in (0, STOPPED):
            raise TrainingError(
                failed or f"The trainer ended unexpectedly ({self._end()}).",
                hint=None if failed else f"Its output is in {self.folder / OUTPUT}.",
            )

    def _end(self) -> str:
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Ask it to end after the step that runs."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
