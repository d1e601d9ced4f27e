"""Starts a trainer's process and follows it; imports no torch, so that the daemon may use it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import msgspec

from lichen.adapters.distil_task import DistilTask
from lichen.adapters.events import Event, EventReader, Failed, Finished, Stopped
from lichen.adapters.task import Examples, Task
from lichen.errors import TrainingError

TASK, EXAMPLES, EVENTS = "task.json", "examples.json", "events.jsonl"
CHECKPOINT, RECALL, LOCK, OUTPUT = "checkpoint.pt", "recall.pt", "lock", "trainer.log"
STOPPED = 3  # exit code of a training that was asked to end and can go on
POLL_S = 0.1
DISTIL = "lichen.adapters.distil"
GRACE_S = 60.0  # that a trainer gets to finish its step and keep a checkpoint
PROGRAM = "lichen.adapters.trainer"


def prepare(folder: Path, task: Task | DistilTask, examples: Examples | None = None) -> None:
    """Write what the trainer reads; only its owner can read it. A distillation has no examples.

    Raises TrainingError when it cannot be written or a trainer is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with filelock.FileLock(folder / LOCK, timeout=0):
            for name, content in ((EXAMPLES, examples), (TASK, task)):
                if content is None:
                    continue
                partial = folder / f".{name}.partial"
                partial.touch(mode=0o600)
                partial.write_bytes(msgspec.json.encode(content))
                partial.replace(folder / name)
    except filelock.Timeout:
        raise TrainingError(f"Another process trains in {folder} already.") from None
    except OSError as error:
        raise TrainingError(f"The folder {folder} cannot be written: {error.strerror}.") from error


def at_work(folder: Path) -> bool:
    """Whether a trainer holds the folder, such as one whose daemon died while it takes its last step."""
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # no folder yet, or none that can be written, which whoever writes into it will say
        return False


class Training:
    """A running trainer. Iterate for its events; `stop` asks it to keep a checkpoint and end."""

    def __init__(self, folder: Path, module: str | None = None) -> None:
        """Start it in a prepared folder: PROGRAM, or DISTIL. It is in a session of its own, so that Ctrl-C
        does not reach it. Raises TrainingError when the system refuses.
        """
        self.folder = folder
        self._last: Failed | Finished | Stopped | None = None
        self._deadline: float | None = None
        try:
            self._reader = EventReader(folder / EVENTS)
            with (folder / OUTPUT).open("wb") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", module or PROGRAM, str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            raise TrainingError(f"The trainer cannot be started: {error.strerror or error}.") from error

    def __iter__(self) -> Iterator[Event]:
        """Events until it has ended. Blocks. Raises TrainingError when it failed or was killed."""
        while True:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.process.kill()  # it goes on from its last checkpoint
            ended = self.process.poll() is not None
            for event in self._reader.new():
                if isinstance(event, Failed | Finished | Stopped):
                    self._last = event
                yield event
            if ended:
                break
            time.sleep(POLL_S)
        if isinstance(self._last, Failed):
            raise TrainingError(self._last.error)
        if self._last is None and not (self._deadline is not None and self.process.returncode < 0):
            raise TrainingError(
                f"The trainer ended unexpectedly ({self._end()}).",
                hint=f"Its output is in {self.folder / OUTPUT}.",
            )

    def _end(self) -> str:
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self, grace: float = GRACE_S) -> None:
        """Ask it to end after the step that runs; whoever iterates kills it after `grace` seconds."""
        deadline = time.monotonic() + grace
        if self._deadline is not None:
            self._deadline = min(self._deadline, deadline)
        elif self.process.poll() is None:  # once, since a dying interpreter has no handlers left
            self._deadline = deadline
            self.process.send_signal(signal.SIGTERM)
