"""The trainer's process: `python -m lichen.adapters.trainer FOLDER`, started by `launch.py`.

The folder holds task.json and examples.json; it gets events.jsonl and checkpoint.pt, and is held by a lock
while the process runs. The process has the lowest priority, and waits between the parts of a step
while requests run (`courtesy.py`). SIGTERM and SIGINT, or the end of the process that started it, end it
after the step that runs, with a checkpoint, and a measurement at once; after `kill -9` it goes on from the
last checkpoint. The adapter as it is after half of the steps is kept too, so that the gate may choose.
Exit codes: 0 finished, 3 stopped, 1 failed; an event says more.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

import filelock
import msgspec
import torch

import lichen
from lichen.adapters import checkpoint
from lichen.adapters.courtesy import Courtesy
from lichen.adapters.events import EventLog, Failed, Finished, Measured, Saved, Started, Stepped, Stopped
from lichen.adapters.launch import CHECKPOINT, EVENTS, EXAMPLES, LOCK, RECALL, STOPPED, TASK
from lichen.adapters.lineage import ADAPTER, MANIFEST, MIDDLE
from lichen.adapters.lora_file import write_adapter
from lichen.adapters.prune import Pruned
from lichen.adapters.recall import Recalled, recall
from lichen.adapters.task import Example, Examples, Manifest, Task
from lichen.adapters.train import Trainer
from lichen.durable import sync_folder, write_file
from lichen.errors import LichenError, TrainingError
from lichen.models.decoder import Decoder
from lichen.models.load import load_model

BUSY_LOOK_S = 0.02


class _Ended(Exception):
    """It was asked to stop while it took no step."""


class Run:
    """One process's part of a training. Signals only set `stopping`."""

    def __init__(self, folder: Path, tell: EventLog) -> None:
        self.folder, self.tell = folder, tell
        self.stopping = False
        self._step = 0  # of the last checkpoint
        self._parent = os.getppid()
        self._courtesy = Courtesy(folder)
        examples = (folder / EXAMPLES).read_bytes()
        self.task = msgspec.json.decode((folder / TASK).read_bytes(), type=Task)
        self.identity = self.task.identity(examples)
        self._examples = msgspec.json.decode(examples, type=Examples)
        step_back(self.task.nice)

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """End after this step."""
        self.stopping = True

    def __call__(self) -> int:
        """Train to the end or until stopped; the exit code."""
        try:
            return self._run()
        except _Ended:
            self.tell(Stopped(self._step))
            return STOPPED

    def _run(self) -> int:
        started = time.monotonic()
        torch.set_num_threads(self.task.threads)
        model = load_model(Path(self.task.model))
        recalled = self._recalled(model)
        if recalled is None:
            self.tell(Stopped(0))
            return STOPPED
        trainer = Trainer(model, self.task, self._examples, self.folder, recalled)
        trainer.breathe = self._breathe_or_end
        limit_memory(self.task.memory)
        path = self.folder / CHECKPOINT
        state = checkpoint.load(path, self.identity)
        if state is None:
            self._forget_middle()  # of another training
            began = time.monotonic()
            self.before = trainer.measure("before")
            if self.task.minutes is not None:
                measuring = (time.monotonic() - began) * (self.task.measurements + 1)
                trainer.fit_into(self.task.minutes * 60 - (time.monotonic() - started) - measuring)
            self._save(trainer)
        else:
            trainer.restore(state)
            self._step = trainer.step
            self.before = msgspec.convert(state["before"], Measured)
        self.tell(self.before)
        self.tell(Started(trainer.step, trainer.steps, trainer.parameters, trainer.rate))
        if not self._steps(trainer):
            raise _Ended
        pruned = trainer.prune() if self.task.prune else None
        after = trainer.measure("after")
        self.tell(after)
        place = self._publish(trainer, after, pruned)
        path.unlink()
        (self.folder / RECALL).unlink(missing_ok=True)
        self._forget_middle()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.tell(Finished(str(place), time.monotonic() - started, peak))
        return 0

    def _recalled(self, model: Decoder) -> list[Recalled] | None:
        """The model's own answers, by an earlier process of this training or made now; None when stopped."""
        path = self.folder / RECALL
        stored = checkpoint.load(path, self.identity)
        if stored is not None:
            rows = zip(*stored["recalled"], strict=True)
            return [Recalled(Example(asked, answer), *more) for asked, answer, *more in rows]
        found = recall(
            model,
            self._examples.asked,
            ends=frozenset(self._examples.ends),
            length=self.task.keeping.length,
            seed=self.task.seed,
            going_on=lambda: not self._ending(),
        )
        if self._ending():
            return None
        columns = [
            [one.example.prompt for one in found],
            [one.example.answer for one in found],
            [one.likely for one in found],
            [one.logs for one in found],
            [one.loss for one in found],
        ]
        checkpoint.save(path, {"identity": self.identity, "recalled": columns})
        return found

    def _steps(self, trainer: Trainer) -> bool:
        """All steps that are left; False where it was stopped before."""
        saved = begun = time.monotonic()
        done = 0
        trainer.breathe = self._breathe  # a step that has begun is finished
        while trainer.step < trainer.steps and not self._ending():
            started = time.monotonic()
            step = trainer.advance()
            now = time.monotonic()
            done += 1
            left = (now - begun) / done * (trainer.steps - trainer.step)
            speed = step.tokens / (now - started)
            told = Stepped(trainer.step, step.epoch, step.loss, step.rate, step.norm, speed, left, step.kept)
            self.tell(told)
            if trainer.step == trainer.steps // 2 and not self.task.prune:  # a pruned end has no match in it
                self._write(trainer, self.folder / MIDDLE)  # before a checkpoint is past it
            if self._measures_at(trainer):
                self.tell(trainer.measure(f"step {trainer.step}"))
            if now - saved >= self.task.checkpoint:
                self._save(trainer)
                saved = now
        self._save(trainer)
        trainer.breathe = self._breathe_or_end
        return trainer.step == trainer.steps

    def _measures_at(self, trainer: Trainer) -> bool:
        """Whether this step is one of those, evenly spread, after which it is measured."""
        parts = self.task.measurements + 1
        done, before = (step * parts // trainer.steps for step in (trainer.step, trainer.step - 1))
        return done > before and trainer.step < trainer.steps

    def _breathe(self) -> None:
        """Wait while the machine is needed for requests."""
        while self._courtesy.busy and not self._ending():
            time.sleep(BUSY_LOOK_S)

    def _breathe_or_end(self) -> None:
        """The same while there is no step to lose. Raises _Ended."""
        self._breathe()
        if self._ending():
            raise _Ended

    def _ending(self) -> bool:
        """Whether it was asked to stop, or whoever started it is gone."""
        return self.stopping or os.getppid() != self._parent

    def _save(self, trainer: Trainer) -> None:
        state = {**trainer.state(), "identity": self.identity, "before": msgspec.to_builtins(self.before)}
        checkpoint.save(self.folder / CHECKPOINT, state)
        self._step = trainer.step
        self.tell(Saved(trainer.step))

    def _forget_middle(self) -> None:
        """Remove it, and what a killed process left of writing it."""
        for left in self.folder.glob(f"*{MIDDLE}*"):
            left.unlink()

    @functools.cached_property
    def _base(self) -> str:
        with Path(self.task.model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _write(self, trainer: Trainer, path: Path) -> None:
        """Write the adapter as it is now; the file appears whole, and durable."""
        write_adapter(trainer.model, path, self.task.lora, name=self.task.name, base=self._base)

    def _publish(self, trainer: Trainer, after: Measured, pruned: Pruned | None) -> Path:
        """Put the adapter and what is known of it into `<output>/<digest>/`, which appears whole."""
        output = Path(self.task.output)
        staged = output / f".{self.identity[:16]}.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True, mode=0o700)
        self._write(trainer, staged / ADAPTER)
        digest = hashlib.sha256((staged / ADAPTER).read_bytes()).hexdigest()
        middle = self.folder / MIDDLE
        if middle.exists():
            write_file(staged / MIDDLE, middle.read_bytes())
        manifest = Manifest(
            name=self.task.name,
            sha256=digest,
            base=self._base,
            task=self.task,
            first=trainer.first,
            steps=trainer.steps,
            rate=trainer.rate,
            before=msgspec.to_builtins(self.before),
            after=msgspec.to_builtins(after),
            pruned=msgspec.to_builtins(pruned),
            middle=trainer.steps // 2 if middle.exists() else None,
            lichen=lichen.__version__,
            torch=str(torch.__version__),
        )
        write_file(staged / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
        place = output / digest[:16]
        shutil.rmtree(place, ignore_errors=True)  # the same bytes, trained before
        staged.rename(place)
        sync_folder(output)  # before the checkpoint goes
        return place


def limit_memory(count: int) -> None:
    """Let the process allocate at most so many bytes from here on; 0 for no limit.

    Linux counts only what is written, not what is mapped (RLIMIT_DATA). Elsewhere it has no effect.
    """
    if not count or not sys.platform.startswith("linux"):
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # data and stack
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + count, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def step_back(nice: int) -> None:
    """Take a lower priority, as far as the system allows it.

    Where Linux groups processes by session (sched(7), autogroup), `nice` counts only within a session, and
    the trainer has one of its own: its group must be nice as well.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")


def _words(error: BaseException) -> str:
    if isinstance(error, LichenError):
        return str(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return str(
            TrainingError(
                "The training needs more memory than it may take.", hint="Lower --rank or the batch."
            )
        )
    return f"An unexpected error ended the training: {type(error).__name__}: {error}."


class Job(Protocol):
    """What a trainer's process does in its folder."""

    def __call__(self) -> int: ...

    def stop(self, _signal: int, _frame: FrameType | None) -> None: ...


def run_in(folder: Path, make: Callable[[Path, EventLog], Job]) -> int:
    """Do a job in a folder, alone and until a signal; the exit code."""
    tell = EventLog(folder / EVENTS)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            run = make(folder, tell)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, run.stop)  # to the very end: asked twice, it must not die of it
            return run()
    except filelock.Timeout:
        tell(Failed("Another process trains in this folder already."))
    except Exception as error:
        tell(Failed(_words(error)))
        if not isinstance(error, LichenError):
            raise
    finally:
        tell.close()
    return 1


if __name__ == "__main__":
    sys.exit(run_in(Path(sys.argv[1]), Run))
