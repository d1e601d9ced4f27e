"""Learns a better draft head from the answers of this daemon, while it serves.

A thread of its own waits until enough was collected (`distil.py`), has it learned by a process of the lowest
priority (`adapters/distil.py`), which also compares the new head with the present one on the newest answers,
and swaps a better one in between two steps. As answers go on, the head before is measured beside the present
one, and served again where it would have guessed better.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from lichen.adapters.distil_task import DistilTask
from lichen.adapters.draft_head import DraftHead
from lichen.adapters.events import Compared, Stopped
from lichen.adapters.grading import MARGIN, grade
from lichen.adapters.launch import CHECKPOINT, DISTIL, TASK, Training, prepare
from lichen.adapters.states import read_segments, segment_files
from lichen.errors import LichenError, Unavailable
from lichen.runtime.speculation.distil import StateCollector
from lichen.runtime.speculation.head import HeadDrafter
from lichen.runtime.speculation.heads import HeadStore

log = logging.getLogger("lichen.distil")

POLL_S = 1.0
FRESH = 3000  # collected tokens after which a head is trained
REVIEWED = 1500  # tokens after which the present head is compared with the one before
STEPS = 600
MINUTES = 3.0  # of a training
PAUSE_S = 600.0  # after a training that failed


class HeadLearning:
    """See the module. model: its file. folder: of the trainer's files. step_s: seconds of a plain step."""

    def __init__(
        self,
        model: Path,
        store: HeadStore,
        drafter: HeadDrafter,
        collector: StateCollector,
        *,
        folder: Path,
        step_s: Callable[[], float],
    ) -> None:
        self.store = store
        self.trainings = self.swaps = self.rollbacks = 0
        self.fresh, self.minutes, self.steps = FRESH, MINUTES, STEPS
        self._model, self._drafter, self._collector = model, drafter, collector
        self._folder, self._step_s = folder, step_s
        self._call: Callable[[Callable[[], None]], None] = lambda function: function()
        self._closing = threading.Event()
        self._training: Training | None = None
        self._learned = self._reviewed = 0  # collected tokens at the last training, and at the last review
        self._thread = threading.Thread(target=self._run, name="lichen-learning", daemon=True)

    def start(self, call: Callable[[Callable[[], None]], None]) -> None:
        """Begin. call: runs a function on the engine thread between two steps."""
        self._call = call
        self._thread.start()

    @property
    def training(self) -> bool:
        """Whether a head is being trained now."""
        return self._training is not None

    def close(self) -> None:
        """End; a training that runs keeps a checkpoint and goes on after a restart. Blocks for one step."""
        self._closing.set()
        if (training := self._training) is not None:
            training.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if find_spec("torch") is None:
            log.warning("The draft head cannot learn: torch is not installed (pip install 'lichen[train]').")
            return
        resume = self._unfinished()
        pause = POLL_S
        while not self._closing.wait(pause):
            pause = POLL_S
            try:
                if resume or self._collector.collected - self._learned >= self.fresh:
                    self._learn(resume)
                elif self._collector.collected - self._reviewed >= REVIEWED:
                    self._review()
            except (LichenError, OSError) as error:
                if not self._closing.is_set():
                    log.warning("The draft head could not learn. %s", error)
                pause = PAUSE_S
            except Exception:  # a defect of ours must not end the learning for good
                log.exception("The draft head could not learn.")
                pause = PAUSE_S
            resume = False

    def _unfinished(self) -> bool:
        """Whether an earlier process left a training that can go on."""
        if not (self._folder / CHECKPOINT).is_file():
            return False
        with suppress(OSError, msgspec.MsgspecError):
            task = msgspec.json.decode((self._folder / TASK).read_bytes(), type=DistilTask)
            start = str(self.store.path(self.store.version)) if self.store.version else ""
            return task.base == self.store.base and task.start == start
        return False

    def _learn(self, resume: bool) -> None:
        """One training, and the swap if its head is better."""
        self._learned = self._reviewed = self._collector.collected
        output = self._folder / "new.head.gguf"
        if not resume:
            prepare(self._folder, self._task(output))
        self._training = Training(self._folder, DISTIL)
        if self._closing.is_set():
            self._training.stop()
        compared: Compared | None = None
        stopped = False
        try:
            for event in self._training:  # to its end, so that no process is left behind
                stopped = stopped or isinstance(event, Stopped)
                if isinstance(event, Compared):
                    compared = event
        finally:
            self._training = None
        if stopped:
            return
        self.trainings += 1
        if compared is None or not compared.better:
            log.info("A newly trained draft head is not better, and is left out.")
            return
        head = self.store.read(output)
        version = self.store.add(head)
        output.unlink(missing_ok=True)
        self._swap(head)
        self.swaps += 1
        log.info(
            "Draft head %d is served: %.0f%% of first guesses right, %s before.",
            version,
            100 * compared.new.acceptance[0],
            "none" if compared.old is None else f"{100 * compared.old.acceptance[0]:.0f}%",
        )

    def _task(self, output: Path) -> DistilTask:
        self._collector.flush()
        folder = self._collector.folder
        return DistilTask(
            model=str(self._model),
            base=self.store.base,
            states=str(folder),
            segments=tuple(path.name for path in segment_files(folder)),
            output=str(output),
            start=str(self.store.path(self.store.version)) if self.store.version else "",
            steps=self.steps,
            minutes=self.minutes,
            step_s=max(1e-4, self._step_s()),
        )

    def _review(self) -> None:
        """Serve the head before again, where it would have guessed the newest answers better."""
        self._reviewed = self._collector.collected
        current, before = self._drafter.head, self.store.previous()
        if current is None or before is None:
            return
        newest = segment_files(self._collector.folder)[-2:]
        runs = list(read_segments(newest, hidden=self.store.hidden, vocabulary=self.store.vocabulary))
        step_s = max(1e-4, self._step_s())
        now, then = grade(current, runs, step_s=step_s), grade(before, runs, step_s=step_s)
        if now is None or then is None or then.value <= MARGIN * now.value:
            return
        self.store.roll_back()
        self._swap(before)
        self.rollbacks += 1
        log.info(
            "The draft head before is served again: %.0f%% of first guesses right instead of %.0f%%.",
            100 * then.acceptance[0],
            100 * now.acceptance[0],
        )

    def _swap(self, head: DraftHead) -> None:
        with suppress(Unavailable):  # the engine is gone: nobody guesses any more
            self._call(lambda: self._drafter.swap(head))
