"""`kill -9` in every state, and torn files after it: a machine serves its old version or its new one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lichen.errors import StoreError
from lichen.sync.updates.states import STATES
from tests.sync.update_bench import MODEL, Machine
from tests.sync.update_process import NEW, OLD

SCRIPT = Path(__file__).with_name("update_process.py")
ROOT = Path(__file__).resolve().parents[2]
REACHED = STATES[:-1]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a machine that was killed in each state; all at once, since starting takes longest."""
    folders: dict[str, Path] = {state: tmp_path_factory.mktemp(state) for state in REACHED}
    processes = {
        state: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), state],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for state, folder in folders.items()
    }
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.kill()
        process.wait()
        process.stdout.close()
    return folders


async def comes_up(folder: Path, *, torn: bool = False) -> bytes:
    """What the machine serves before and after the next pull, which must bring the new version."""
    machine = Machine(folder)
    try:
        at_once = machine.serves(MODEL)
    except StoreError:  # both files of slots were torn: the pull mends it
        at_once = OLD
    assert at_once in (OLD, NEW)
    machine.shop.add(MODEL, NEW)
    outcome = await machine.pull(MODEL)
    if torn and outcome.update is not None and outcome.update.cause == "failed":
        assert machine.serves(MODEL) == OLD
        outcome = await machine.pull(MODEL)  # torn bytes are fetched again
    assert not outcome.error, outcome.error
    assert machine.serves(MODEL) == NEW
    assert machine.slot(MODEL).confirmed, outcome
    latest = machine.updater.ledger.latest().get(MODEL)
    assert torn or (latest is not None and latest.state == "confirmed")
    machine.updater.close()
    return at_once


@pytest.mark.parametrize("state", REACHED)
async def test_kill_9_in_a_state(killed: dict[str, Path], tmp_path: Path, state: str) -> None:
    folder = tmp_path / "machine"
    shutil.copytree(killed[state], folder)
    served = await comes_up(folder)
    assert served == (NEW if state in ("active", "confirmed") else OLD)


@pytest.mark.parametrize("state", REACHED)
async def test_torn_writes_in_a_state(killed: dict[str, Path], tmp_path: Path, state: str) -> None:
    """Each of the newest files, cut to nothing and to half; what was confirmed before the update is older."""
    old = hashlib.sha256(OLD).hexdigest()
    files = (path for path in killed[state].rglob("*") if path.is_file() and path.suffix != ".lock")
    there = [path for path in files if path.name != old]
    newest = sorted(there, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:5]
    for number, (path, share) in enumerate((path, share) for path in newest for share in (0.0, 0.5)):
        folder = tmp_path / str(number)
        shutil.copytree(killed[state], folder)
        torn = folder / path.relative_to(killed[state])
        os.truncate(torn, int(torn.stat().st_size * share))
        await comes_up(folder, torn=True)
        shutil.rmtree(folder)


async def test_both_files_of_slots_torn(killed: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    shutil.copytree(killed["confirmed"], folder)
    for name in ("active", "active.previous"):
        os.truncate(folder / "store" / name, 3)
    machine = Machine(folder)
    with pytest.raises(StoreError, match="is damaged"):
        machine.serves(MODEL)
    await machine.updater.pull([])
    assert machine.serves(MODEL) == NEW


async def test_a_version_that_kills_its_process_is_bad(killed: dict[str, Path], tmp_path: Path) -> None:
    """Each death in a trial counts, and after the second one the old version serves again."""
    folder = tmp_path / "machine"
    shutil.copytree(killed["active"], folder)
    machine = Machine(folder)
    machine.shop.add(MODEL, NEW)
    update = machine.updater.ledger.latest()[MODEL]
    machine.updater.ledger.save(msgspec.structs.replace(update, trials=2))
    outcome = await machine.pull(MODEL)
    assert outcome.update is not None
    assert (outcome.update.cause, outcome.update.reason) == ("unhealthy", "lichen died in its trial, twice.")
    assert machine.serves(MODEL) == OLD
    assert "not tried again" in (await machine.pull(MODEL)).error
