"""A process that looks like a trainer from outside: steps of no work, a checkpoint, an adapter that is given.

What it does is written into the adapter's name: "steps-20" takes twenty steps, "die" kills itself at the
third, "fail" ends in an error, "worse" learns nothing, "deaf" does not end when asked. It waits between
steps while the daemon is busy, and goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import filelock

from lichen.adapters.courtesy import Courtesy
from lichen.adapters.events import EventLog, Failed, Finished, Measured, Saved, Started, Stepped, Stopped
from lichen.adapters.launch import EVENTS, LOCK, STOPPED, TASK

GIVEN = "LICHEN_TEST_ADAPTER"  # folder with the adapter.gguf and adapter.json of its result
STEP_S = 0.05


def main() -> int:
    folder = Path(sys.argv[1])
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    lock.acquire()
    task: dict[str, Any] = json.loads((folder / TASK).read_bytes())
    tell, courtesy, checkpoint = EventLog(folder / EVENTS), Courtesy(folder), folder / "checkpoint.pt"
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopping.append(received))
    found = re.search(r"steps-(\d+)", task["name"])
    steps = int(found[1]) if found else 3
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    tell(Measured("before", loss=3.0, exact=0.0, general=2.0))
    tell(Started(step, steps, 8, 1e-3))
    if task["name"].startswith("fail"):
        tell(Failed("The loss of step 2 is no number."))
        return 1
    parent = os.getppid()
    while step < steps:
        if (stopping and not task["name"].startswith("deaf")) or os.getppid() != parent:
            checkpoint.write_text(str(step))
            tell(Saved(step))
            tell(Stopped(step))
            return STOPPED
        if courtesy.busy:
            time.sleep(0.01)
            continue
        time.sleep(STEP_S)
        step += 1
        tell(Stepped(step, 0, 2.0, 1e-3, 1.0, 100.0, (steps - step) * STEP_S))
        if task["name"].startswith("die") and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    after = 3.5 if task["name"].startswith("worse") else 1.0
    tell(Measured("after", loss=after, exact=0.5, general=2.0))
    place = Path(task["output"]) / "adapter"
    shutil.copytree(os.environ[GIVEN], place)
    manifest = json.loads((place / "adapter.json").read_bytes())
    manifest["after"]["loss"] = after
    (place / "adapter.json").write_text(json.dumps(manifest))
    tell(Finished(str(place), 1.0, 1000))
    return 0


if __name__ == "__main__":
    sys.exit(main())
