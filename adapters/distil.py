"""The process that trains a draft head: `python -m lichen.adapters.distil FOLDER`, started by `launch.py`.

The folder holds task.json; everything else is as with `trainer.py`. Two things are added to what learning
needs: the newest answers are held out, and the new head is graded on them beside the one that it goes on
from. Only a better one is written to the task's output; an event tells both grades.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec
import torch

from lichen.adapters import checkpoint
from lichen.adapters.distil_task import DistilTask, model_sizes
from lichen.adapters.draft_head import DraftHead, read_head, write_head
from lichen.adapters.events import Compared, EventLog, Finished, Saved, Started, Stepped, Stopped
from lichen.adapters.grading import grade
from lichen.adapters.head_training import HeadTrainer
from lichen.adapters.launch import CHECKPOINT, STOPPED, TASK
from lichen.adapters.states import Run, read_segments
from lichen.adapters.trainer import limit_memory, run_in
from lichen.errors import TrainingError


class Distillation:
    """One process's part of a training. Signals only set `stopping`."""

    def __init__(self, folder: Path, tell: EventLog) -> None:
        self.folder, self.tell = folder, tell
        self.stopping = False
        self._parent = os.getppid()
        self.task = msgspec.json.decode((folder / TASK).read_bytes(), type=DistilTask)
        self.identity = self.task.identity()

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """End after this step."""
        self.stopping = True

    def __call__(self) -> int:
        """Train to the end or until stopped; the exit code."""
        started = time.monotonic()
        task = self.task
        torch.set_num_threads(task.threads)
        limit_memory(task.memory)
        hidden, vocabulary = model_sizes(Path(task.model))
        paths = [Path(task.states) / name for name in task.segments]
        runs = list(read_segments(paths, hidden=hidden, vocabulary=vocabulary))
        train, held_out = split(runs, task.held_out)
        start = _start(task, vocabulary, hidden)
        trainer = HeadTrainer(task, train, start, vocabulary)
        state = checkpoint.load(self.folder / CHECKPOINT, self.identity)
        if state is not None:
            trainer.restore(state)
        elif task.minutes is not None:
            trainer.fit_into(task.minutes * 60)
        self.tell(Started(trainer.step, trainer.steps, trainer.parameters, task.rate))
        if not self._steps(trainer):
            self.tell(Stopped(trainer.step))
            return STOPPED
        self._publish(trainer.head(), start, held_out)
        (self.folder / CHECKPOINT).unlink()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.tell(Finished(task.output, time.monotonic() - started, peak))
        return 0

    def _steps(self, trainer: HeadTrainer) -> bool:
        """All steps that are left; False where it was stopped before."""
        begun = saved = told = time.monotonic()
        done = 0
        while trainer.step < trainer.steps and not self._ending():
            loss, rate, norm = trainer.advance()
            done += 1
            now = time.monotonic()
            if now - told >= 0.2 or trainer.step == trainer.steps:
                each = (now - begun) / done
                left = each * (trainer.steps - trainer.step)
                epoch = trainer.step * self.task.batch // len(trainer.lessons)
                self.tell(Stepped(trainer.step, epoch, loss, rate, norm, self.task.batch / each, left))
                told = now
            if now - saved >= self.task.checkpoint:
                self._save(trainer)
                saved = now
        self._save(trainer)
        return trainer.step == trainer.steps

    def _ending(self) -> bool:
        """Whether it was asked to stop, or whoever started it is gone."""
        return self.stopping or os.getppid() != self._parent

    def _save(self, trainer: HeadTrainer) -> None:
        checkpoint.save(self.folder / CHECKPOINT, {**trainer.state(), "identity": self.identity})
        self.tell(Saved(trainer.step))

    def _publish(self, head: DraftHead, start: DraftHead | None, held_out: Sequence[Run]) -> None:
        """Grade both heads on the newest answers, and write the new one where it is better."""
        graded = grade(head, held_out, step_s=self.task.step_s)
        before = None if start is None else grade(start, held_out, step_s=self.task.step_s)
        if graded is None:
            raise TrainingError("There are too few answers to measure a head on.", hint="Ask for a few more.")
        better = graded.better_than(before)
        if better:
            head.facts = msgspec.structs.replace(head.facts, acceptance=graded.acceptance)
            write_head(Path(self.task.output), head)
        self.tell(Compared(graded, before, better))


def split(runs: Sequence[Run], share: float) -> tuple[list[Run], list[Run]]:
    """What teaches, and the newest runs with about this share of the tokens, at least one of two."""
    wanted = share * sum(len(run) for run in runs)
    held = 0.0
    at = len(runs)
    while at > 1 and held < wanted:
        at -= 1
        held += len(runs[at])
    if at == len(runs):
        raise TrainingError("There are no answers to learn from yet.", hint="Ask for a few first.")
    return list(runs[:at]), list(runs[at:])


def _start(task: DistilTask, vocabulary: int, hidden: int) -> DraftHead | None:
    if not task.start:
        return None
    return read_head(Path(task.start), base=task.base, vocabulary=vocabulary, hidden=hidden)


if __name__ == "__main__":
    sys.exit(run_in(Path(sys.argv[1]), Distillation))
