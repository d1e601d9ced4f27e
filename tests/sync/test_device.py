"""A device's first trust and its memory: bundles, torn files, and the clock that decides."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from lichen.errors import FleetError, MetadataExpired, TrustError
from lichen.sync.trust.device import Device
from lichen.sync.trust.enrolment import Enrolment, read_enrolment, write_enrolment
from lichen.sync.trust.record import Record
from lichen.sync.trust.verification import Verification, Walk, standing
from tests.sync.hostile_repository import NOW, Files, HostileRepository


def bundle(repository: HostileRepository, fleet: str = "moss") -> bytes:
    root = repository.first_root
    return write_enrolment(Enrolment(fleet=fleet, root=root, mirrors=("https://m.example/",)))


def carry_out(walk: Walk[None], files: Files) -> None:
    """A walk without any asynchrony: what it wants comes from a dictionary."""
    try:
        wanted = next(walk)
        while True:
            wanted = walk.send(files.get(f"metadata/{wanted.name}"))
    except StopIteration:
        return


def test_verification_takes_bytes_and_a_clock_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, no socket, no clock of the machine: the same bytes at another time are another verdict."""
    repository = HostileRepository()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("verification reached outside")

    for name in ("builtins.open", "os.open", "socket.socket", "time.time"):
        monkeypatch.setattr(name, forbidden)
    trusted = {"root": repository.first_root}
    fresh = Verification(trusted, NOW)
    carry_out(fresh.refresh(), repository.files)
    assert set(fresh.remembered) == {"root", "timestamp", "snapshot", "targets"}
    assert trusted.keys() == {"root"}, "the caller's is left alone"
    late = Verification(fresh.remembered, NOW + datetime.timedelta(days=365))
    with pytest.raises(MetadataExpired):
        carry_out(late.refresh(), repository.files)
    long_ago = Verification(trusted, datetime.datetime(1999, 1, 1, tzinfo=datetime.UTC))
    carry_out(long_ago.refresh(), repository.files)
    assert standing(long_ago.remembered).complete


async def test_a_device_is_enrolled_once(tmp_path: Path) -> None:
    repository, stranger = HostileRepository(), HostileRepository()
    device = Device(tmp_path / "fleet", clock=lambda: NOW)
    with pytest.raises(FleetError, match="in no fleet"):
        device.state()
    with pytest.raises(FleetError, match="in no fleet"):
        await device.refresh([repository.mirror()])
    assert not (tmp_path / "fleet").exists(), "looking makes nothing"
    taken = read_enrolment(bundle(repository))
    with pytest.raises(TrustError, match="fingerprint"):
        device.enrol(bundle(repository), fingerprint="0" * 64)
    device.enrol(bundle(repository), fingerprint=taken.fingerprint.upper())
    assert "has not fetched" in device.state().sentence
    await device.refresh([repository.mirror()])
    device.enrol(bundle(repository))
    assert device.state().standing.complete, "the same fleet again keeps what is trusted"
    with pytest.raises(FleetError, match="in the fleet moss already"):
        device.enrol(bundle(stranger, "fern"))
    device.enrol(bundle(stranger, "fern"), replace=True)
    assert not device.state().standing.complete
    await device.refresh([stranger.mirror()])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "malformed"),
        ({"fleet": "../x"}, "malformed"),
        ({"root": "!!"}, "malformed"),
        ({"mirrors": []}, "malformed"),
        ({"mirrors": ["ftp://x"]}, "cannot be a mirror"),
        ({"tags": {"site": "a\nb"}}, "malformed"),
        ({"unknown": 1}, "malformed"),
        ({"root": "e30="}, "root does not verify"),
        ({"root": "AAAA"}, "root does not verify"),
    ],
)
def test_a_bad_bundle_is_refused(tmp_path: Path, change: dict[str, object], match: str) -> None:
    data = json.dumps(json.loads(bundle(HostileRepository())) | change).encode()
    with pytest.raises(FleetError, match=match):
        Device(tmp_path / "fleet").enrol(data)
    assert not (tmp_path / "fleet").exists()


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 9_000, b"[]", b" " * (2 << 20)])
def test_bytes_that_are_no_bundle_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FleetError, match="enrolment bundle"):
        Device(tmp_path / "fleet").enrol(data)


def test_a_root_signed_by_too_few_gives_no_first_trust(tmp_path: Path) -> None:
    repository = HostileRepository()
    repository.sign_root(repository.keys["root"][:1])
    root = repository.files["metadata/1.root.json"]
    data = write_enrolment(Enrolment(fleet="moss", root=root, mirrors=("https://m.example/",)))
    with pytest.raises(TrustError, match="root does not verify"):
        Device(tmp_path / "fleet").enrol(data)


async def test_a_torn_file_gives_way_to_the_previous_one(tmp_path: Path) -> None:
    """Every damage is noticed; the previous set guards against rollback; two torn files are said."""
    repository = HostileRepository()
    device, folder = Device(tmp_path, clock=lambda: NOW), tmp_path
    device.enrol(bundle(repository))
    old = repository.mirror()
    await device.refresh([old])
    repository.release()
    middle = repository.mirror()
    await device.refresh([middle])
    repository.release()
    await device.refresh([repository.mirror()])
    whole = (folder / "trusted").read_bytes()
    for torn in (b"", whole[: len(whole) // 2], whole[:-1] + b"x", b"\0" * len(whole), whole + b"}"):
        (folder / "trusted").write_bytes(torn)
        assert device.state().standing.versions["timestamp"] == 2
        assert device.state().can_update
    with pytest.raises(TrustError, match="timestamp does not verify"):
        await device.refresh([old])
    await device.refresh([repository.mirror()])
    assert device.state().standing.versions["timestamp"] == 3
    assert Record(folder).load() is not None
    for name in ("trusted", "trusted.previous"):
        (folder / name).write_bytes(b"torn")
    with pytest.raises(TrustError, match="is damaged") as caught:
        device.state()
    assert "--replace" in str(caught.value)
    device.enrol(bundle(repository), replace=True)
    await device.refresh([repository.mirror()])


def test_a_lost_rename_leaves_the_previous_set(tmp_path: Path) -> None:
    """Death between the two renames of a save."""
    record = Record(tmp_path)
    record.save({"root": b"1"})
    record.save({"root": b"2"})
    assert (record.load(), record.path.stat().st_mode & 0o077) == ({"root": b"2"}, 0)
    record.path.replace(record.previous)
    assert record.load() == {"root": b"2"}
    record.save({"root": b"3"})
    record.path.write_bytes(b"torn")
    record.save({"root": b"4"})
    record.path.unlink()
    assert record.load() == {"root": b"2"}, "a torn file never takes the place of a whole one"
    assert [path.name for path in tmp_path.iterdir()] == ["trusted.previous"], "nothing else is left behind"
