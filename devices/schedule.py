"""What to measure next: rounds over all tasks, within a budget of time, and a place to stop between any two.

A round takes one sample of each task, so that a quiet or a busy minute of the machine falls on all alike.
The first round comes in full before anything is measured again, and what an earlier run kept counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from lichen.devices.fingerprint import Bench, Record, Task

ROUNDS = 5
BUDGET_S = 5.0
SAVE_EVERY_S = 1.0  # what a crash may cost


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """done, total: samples. task: the one that comes next; None at the end."""

    done: int
    total: int
    task: Task | None


def missing(record: Record, wanted: Sequence[Task], rounds: int) -> list[Task]:
    """Tasks that still want samples, in the order in which to take them: those with fewest first."""
    order = {task: place for place, task in enumerate(wanted)}
    due = [
        (number, order[task], task)
        for task in wanted
        for number in range(record.count(task), task.samples(rounds))
    ]
    return [task for _, _, task in sorted(due, key=lambda one: one[:2])]


def measure(
    bench: Bench,
    record: Record,
    wanted: Sequence[Task],
    *,
    save: Callable[[Record], None],
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda now: None,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Take the samples that a record lacks; whether every task has one at the end.

    Stops before the next sample when `stopped` says so, and when the budget is spent and each task has a
    sample. What was measured is saved then, and also when something raises: an error of the bench, or an
    interruption.
    """
    due = missing(record, wanted, rounds)
    total = sum(task.samples(rounds) for task in wanted)
    started = saved = clock()
    try:
        for place, task in enumerate(due):
            spent = clock() - started > budget_s
            if stopped() or (spent and record.count(task)):  # those without a sample come first
                break
            progress(Progress(done=total - len(due) + place, total=total, task=task))
            record.add(task, bench.measure(task))
            if clock() - saved > SAVE_EVERY_S:
                save(record)
                saved = clock()
        else:
            progress(Progress(done=total, total=total, task=None))
    finally:
        save(record)
    return all(record.count(task) for task in wanted)
