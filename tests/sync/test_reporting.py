"""Reports of a device: kept through power cuts, sent once, and never more than numbers and codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from lichen.errors import FleetError, SourceError
from lichen.sync.reporting.key import DeviceKey, verify
from lichen.sync.reporting.outbox import Outbox
from lichen.sync.reporting.wire import BATCH, Batch, UpdateReport, device_id
from tests.sync.reporting import SLOT, World, report


def test_a_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "fleet" / "device.key"
    key = DeviceKey.at(path)
    assert (path.stat().st_mode & 0o777, len(path.read_bytes())) == (0o600, 32)
    assert DeviceKey.at(path).id == key.id == device_id(key.public)
    assert [each.name for each in path.parent.iterdir()] == ["device.key"]
    path.chmod(0o644)
    with pytest.raises(FleetError, match="Others may read"):
        DeviceKey.at(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(FleetError, match="5 bytes, not 32"):
        DeviceKey.at(path)


def test_a_signature_is_for_one_body_one_purpose_and_one_key() -> None:
    key, other = DeviceKey.generate(), DeviceKey.generate()
    signature = key.sign("report", b"body")
    assert verify(key.public, "report", b"body", signature)
    assert not verify(key.public, "report", b"bodY", signature)
    assert not verify(key.public, "join", b"body", signature)
    assert not verify(other.public, "report", b"body", signature)
    assert not verify(b"\0" * 31, "report", b"body", signature)
    assert not verify(key.public, "report", b"body", b"")


def test_no_field_of_a_report_holds_free_words() -> None:
    """What leaves a device is a closed list; a new field has to be looked at here."""
    free = {
        name
        for kind in (UpdateReport, Batch)
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if str in get_args(hint) and not any(getattr(m, "pattern", None) for m in get_args(hint))
    }
    assert free == set()
    assert set(UpdateReport.__struct_fields__) == {
        *("sequence", "at", "slot", "target", "sha256", "state", "cause", "code"),
        *("requests", "errors", "rate", "rate_before", "quality"),
    }
    for words in ("Tell me about my illness", "x" * 65, "a/b", "A"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**msgspec.to_builtins(report()), "code": words}, UpdateReport)


def test_the_oldest_reports_go_first_and_are_counted() -> None:
    outbox = Outbox(":memory:", bound=3, clock=lambda: 0.0)
    for number in range(1, 6):
        assert outbox.put(report(at=float(number))) == number
    assert [each.at for each in outbox.waiting()] == [3, 4, 5]
    assert outbox.dropped() == 2
    outbox.arrived(outbox.waiting(2), 4)
    assert [each.sequence for each in outbox.waiting()] == [5]


def test_numbers_only_go_up_whatever_the_clock_does(tmp_path: Path) -> None:
    times = iter([100.0, 50.0, 50.0, 200.0, -5.0])
    outbox = Outbox(tmp_path / "r.db", clock=lambda: next(times))
    assert [outbox.put(report()) for _ in range(5)] == [100_000, 100_001, 100_002, 200_000, 200_001]
    outbox.close()
    again = Outbox(tmp_path / "r.db", clock=lambda: 0.0)
    assert again.put(report()) == 200_002
    assert (tmp_path / "r.db").stat().st_mode & 0o077 == 0
    again.close()


@pytest.mark.parametrize("damage", [b"", b"not a database" * 1000, None])
def test_a_damaged_outbox_begins_anew(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "r.db"
    outbox = Outbox(path)
    outbox.put(report())
    outbox.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = Outbox(path)
    again.put(report())
    assert len(again.waiting()) >= 1
    again.close()


def test_what_was_put_survives_kill_9(tmp_path: Path) -> None:
    """A process prints each number after `put`; whatever it printed is there after it was killed."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom lichen.sync.reporting.outbox import Outbox\n"
        "from tests.sync.reporting import report\noutbox = Outbox(Path(sys.argv[1]))\n"
        "while True: print(outbox.put(report()), flush=True)\n"
    )
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r.db")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    first = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    printed = first + [int(line) for line in process.stdout.read().splitlines() if line]
    process.stdout.close()
    process.wait()
    outbox = Outbox(tmp_path / "r.db")
    assert {each.sequence for each in outbox.waiting(10_000)} >= set(printed[:-1])
    assert len(outbox.waiting(10_000)) in (len(printed), len(printed) + 1)
    outbox.close()


async def test_reports_wait_for_a_network_and_arrive_once() -> None:
    world = World()
    reporter = world.reporter()
    for number in range(BATCH + 5):
        reporter.put(report(sha256=f"{number:064x}"))
    world.cut = True
    with pytest.raises(SourceError):
        await reporter.flush(world.post)
    world.cut = False
    assert await reporter.flush(world.post) == BATCH + 5
    assert [path for path, _, _ in world.spoken] == [
        "/v1/reports",
        "/v1/devices",
        "/v1/reports",
        "/v1/reports",
    ]
    assert await reporter.flush(world.post) == 0
    (member,) = world.database.members()
    assert (member.id, member.hardware, member.tags) == (reporter.id, "small", {"site": "oslo"})


async def test_a_lost_answer_costs_a_second_sending_and_no_second_report() -> None:
    world = World()
    reporter = world.reporter()
    await reporter.flush(world.post)
    reporter.put(report())
    world.loses_answers = True
    with pytest.raises(SourceError):
        await reporter.flush(world.post)
    assert len(world.sequences()) == 1, "it had arrived"
    world.loses_answers = False
    assert await reporter.flush(world.post) == 0
    assert len(world.sequences()) == 1


async def test_a_device_that_lost_its_outbox_goes_on_above(tmp_path: Path) -> None:
    """Also when its clock stands years behind what it was: no report is taken for an old one."""
    world, key = World(), DeviceKey.generate()
    before = world.reporter(key)
    before.put(report())
    await before.flush(world.post)
    (old,) = world.sequences()
    after = world.reporter(key, Outbox(tmp_path / "new.db", clock=lambda: 5.0))
    after.put(report(state="rolled_back", cause="unhealthy"))
    assert await after.flush(world.post) == 1
    (outcome,) = world.database.reported(SLOT)
    assert (outcome.state, outcome.sequence) == ("rolled_back", old + 1)
    after.close()


@pytest.mark.parametrize("behind", [0, 3 * 3600.0, -3 * 3600.0, 1.7e9])
async def test_clocks_may_be_wrong(behind: float) -> None:
    """A report of ten minutes ago is one of ten minutes ago, whatever the device's clock says."""
    world = World()
    reporter = world.reporter(behind=behind)
    reporter.put(report(at=world.now - behind))
    world.now += 600
    await reporter.flush(world.post)
    (outcome,) = world.database.reported(SLOT)
    assert outcome.at == pytest.approx(world.now - 600)
    (member,) = world.database.members()
    assert member.skew == pytest.approx(behind)


async def test_without_a_collector_nothing_is_kept() -> None:
    world = World()
    outbox = Outbox(":memory:")
    world.reporter(None, outbox, collector=None).put(report())
    assert outbox.waiting() == ()


async def test_a_refusal_is_said_and_loses_nothing() -> None:
    world = World()
    outbox = Outbox(":memory:")
    reporter = world.reporter(None, outbox, token="w" * 32)
    reporter.put(report())
    with pytest.raises(FleetError, match=r"refused the reports of this device \(403\)"):
        await reporter.flush(world.post)
    assert len(outbox.waiting()) == 1

    async def strange(*_: object) -> tuple[int, bytes]:
        return 200, json.dumps({"sequence": 1 << 60}).encode()

    with pytest.raises(FleetError, match="malformed"):
        await reporter.flush(strange)
    assert len(outbox.waiting()) == 1
