"""Every attack of TUF's specification (1.5.2) against a device, by a repository that lies.

Each test shows that the attack fails, and that the device still has what it trusted before.
"""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path

import pytest
from tuf.api.metadata import MetaFile, TargetFile, Targets

from lichen.errors import HashMismatch, MetadataExpired, NotFound, SourceError, TrustError
from tests.sync.hostile_fleet import LICHEN, PATH, Fleet
from tests.sync.hostile_repository import NOW, DeadMirror, HostileRepository, MemoryMirror, new_key, signed


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_the_honest_repository_is_believed(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.fetch(tmp_path) == b"weights"
    fleet.repository.add(PATH, b"better weights")
    fleet.repository.release()
    assert fleet.fetch(tmp_path) == b"better weights"
    assert fleet.device.state().can_update


def test_arbitrary_software_of_a_stranger_is_refused(fleet: Fleet) -> None:
    stranger = HostileRepository()
    stranger.add(PATH, b"malware")
    for _ in range(3):
        stranger.release()
    fleet.refuses(TrustError, "timestamp does not verify", stranger.mirror())


@pytest.mark.parametrize("role", ["snapshot", "targets", "models"])
def test_arbitrary_metadata_in_the_place_of_one_role_is_refused(
    fleet: Fleet, role: str, tmp_path: Path
) -> None:
    repository = fleet.repository
    repository.keys[role] = [new_key()]
    repository.add(PATH, b"malware")
    repository.release()
    with pytest.raises(TrustError, match=f"{role} does not verify"):
        fleet.fetch(tmp_path)
    assert not (tmp_path / "got").exists()


def test_arbitrary_bytes_in_the_place_of_a_target_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    """Wrong hash: same length, other bytes; and a shorter file."""
    name = next(name for name in fleet.repository.files if name.startswith("targets/"))
    for lie in (b"malware", b"mal"):
        fleet.repository.files[name] = lie
        with pytest.raises(HashMismatch, match="not the 7 bytes that the fleet signed"):
            fleet.fetch(tmp_path)
    assert list(tmp_path.glob("*got*")) == [], "nothing of it stays"


def test_rollback_of_the_timestamp_is_refused(fleet: Fleet) -> None:
    old = fleet.repository.mirror()
    fleet.repository.release()
    fleet.refresh()
    fleet.refuses(TrustError, "timestamp does not verify", old)


def test_rollback_of_the_snapshot_under_a_new_timestamp_is_refused(fleet: Fleet) -> None:
    old = fleet.repository.copy()
    fleet.repository.release()
    fleet.refresh()
    old.timestamp.version = fleet.repository.timestamp.version
    old.sign_timestamp()
    fleet.refuses(TrustError, "snapshot version must be >=", old.mirror())


def test_rollback_of_one_role_under_a_new_snapshot_is_refused(fleet: Fleet) -> None:
    repository, old = fleet.repository, fleet.repository.snapshot.meta["models.json"]
    repository.release()
    fleet.refresh()
    repository.snapshot.meta["models.json"] = old
    repository.sign_snapshot()
    with pytest.raises(TrustError, match=r"models\.json version"):
        fleet.refresh()
    del repository.snapshot.meta["models.json"]
    repository.sign_snapshot()
    with pytest.raises(TrustError, match=r"missing info for 'models\.json'"):
        fleet.refresh()


def test_rollback_of_root_is_refused(fleet: Fleet) -> None:
    repository = fleet.repository
    repository.files["metadata/2.root.json"] = repository.files["metadata/1.root.json"]
    fleet.refuses(TrustError, "Expected root version 2")


def test_freeze_is_noticed_when_the_timestamp_expires(fleet: Fleet) -> None:
    frozen = fleet.repository.mirror()
    fleet.now = NOW + datetime.timedelta(days=366)
    fleet.refuses(MetadataExpired, "expired", frozen)
    state = fleet.device.state()
    assert not state.can_update
    assert "takes no updates" in state.sentence
    assert "goes on serving" in state.sentence


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "models", "root"])
def test_expiry_of_any_role_stops_updates(fleet: Fleet, tmp_path: Path, role: str) -> None:
    repository, past = fleet.repository, NOW - datetime.timedelta(seconds=1)
    if role == "root":
        repository.next_root(lambda root: setattr(root, "expires", past))
    else:
        part = repository.roles.get(role) or getattr(repository, role)
        part.expires = past
        repository.release()
    with pytest.raises(MetadataExpired, match=f"{role}.* expired"):
        fleet.fetch(tmp_path)


def test_mix_and_match_of_two_releases_is_refused(fleet: Fleet) -> None:
    """A snapshot of another release, as old and as long, under the current one's name; a role likewise."""
    repository = fleet.repository
    other = repository.copy()
    for part in (other.snapshot, *other.roles.values()):
        part.expires += datetime.timedelta(seconds=1)
    other.release()
    repository.release()
    for name in ("snapshot", "targets"):
        mixed = repository.mirror()
        file = f"metadata/{repository.snapshot.version}.{name}.json"
        assert len(mixed.files[file]) == len(other.files[file])
        mixed.files[file] = other.files[file]
        with pytest.raises(TrustError, match=f"{name} does not verify"):
            fleet.refresh(mixed)


def test_mix_and_match_of_delegated_roles_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    repository = fleet.repository
    other = repository.copy()
    other.roles["models"].expires += datetime.timedelta(seconds=1)
    other.release()
    repository.release()
    file = f"metadata/{repository.roles['models'].version}.models.json"
    repository.files[file] = other.files[file]
    with pytest.raises(TrustError, match="models does not verify"):
        fleet.fetch(tmp_path)


@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json", "3.snapshot.json", "3.targets.json"])
def test_endless_metadata_is_cut(fleet: Fleet, name: str) -> None:
    fleet.repository.release()
    mirror = fleet.repository.mirror()
    mirror.endless.add(f"metadata/{name}")
    with pytest.raises(SourceError, match="sends more than"):
        fleet.refresh(mirror)
    assert mirror.sent <= 600_000


def test_an_endless_target_is_cut_at_its_signed_length(fleet: Fleet, tmp_path: Path) -> None:
    mirror = fleet.repository.mirror()
    mirror.endless |= {name for name in mirror.files if name.startswith("targets/")}
    with pytest.raises(SourceError, match="sends more than the 7 bytes"):
        fleet.fetch(tmp_path, mirror)
    assert list(tmp_path.glob("*got*")) == []


def test_extraneous_dependencies_of_another_role_are_refused(fleet: Fleet) -> None:
    """Whoever holds the models' key cannot add what only the adapters' role may: neither directly nor by
    the top-level role, nor by naming another kind in the manifest."""
    repository = fleet.repository
    repository.add("adapters/extra", b"x", role="models")
    repository.release()

    def target(path: str) -> None:
        asyncio.run(fleet.device.target(path, running=LICHEN, mirrors=[repository.mirror()]))

    with pytest.raises(NotFound):
        target("adapters/extra")
    repository.add("adapters/extra", b"x", role="targets")
    repository.release()
    with pytest.raises(TrustError, match="only the role 'adapters' may"):
        target("adapters/extra")
    repository.add("models/extra", b"x", kind="adapters", base="b" * 64)
    repository.release()
    with pytest.raises(TrustError, match="says that it is 'adapters/extra'"):
        target("models/extra")


def test_fast_forward_is_recovered_from_by_new_keys(fleet: Fleet) -> None:
    """Stolen online keys count versions far up; new keys in root let honest, smaller versions count again."""
    repository = fleet.repository
    honest = repository.copy()
    repository.timestamp.version = 2**31
    repository.snapshot.version = 2**31
    repository.snapshot.meta["targets.json"] = MetaFile(2**31)
    repository.sign_snapshot()
    with pytest.raises(TrustError):
        fleet.refresh()
    fleet.refuses(TrustError, "timestamp does not verify", honest.mirror())
    for role in ("timestamp", "snapshot"):
        honest.replace_key(role)
    honest.release()
    versions = fleet.refresh(honest.mirror()).versions
    assert versions["timestamp"] == honest.timestamp.version < 2**31
    assert versions["root"] == 3


def test_new_keys_of_one_online_role_are_enough_to_recover(fleet: Fleet) -> None:
    repository = fleet.repository
    honest = repository.copy()
    repository.snapshot.version = repository.timestamp.version = 2**31
    repository.sign_snapshot()
    fleet.refresh()
    honest.replace_key("timestamp")
    honest.release()
    assert fleet.refresh(honest.mirror()).versions["snapshot"] == honest.snapshot.version


def test_keys_stolen_below_the_threshold_change_nothing(fleet: Fleet) -> None:
    thief = fleet.repository.copy()
    one, evil = thief.keys["root"][:1], [new_key(), new_key()]
    thief.replace_root_keys(evil, signers=[*one, *evil])
    fleet.refuses(TrustError, "root does not verify", thief.mirror())
    doubled = fleet.repository.copy()
    doubled.replace_root_keys(evil, signers=[one[0], one[0], *evil])
    fleet.refuses(TrustError, "root does not verify", doubled.mirror())


def test_a_new_root_must_be_signed_by_its_own_threshold_too(fleet: Fleet) -> None:
    repository = fleet.repository
    old = repository.keys["root"]
    repository.replace_root_keys([new_key(), new_key()], signers=old)
    fleet.refuses(TrustError, "root does not verify")


def test_keys_stolen_at_the_threshold_lose_to_a_rotation(fleet: Fleet) -> None:
    """Once a device has seen the owner's rotation, what the stolen keys sign is worth nothing to it."""
    repository = fleet.repository
    thief = repository.copy()
    fresh = [new_key() for _ in range(3)]
    repository.replace_root_keys(fresh, signers=[*repository.keys["root"], *fresh])
    fleet.refresh()
    thief.root.version += 1
    thief.next_root()
    with pytest.raises(TrustError, match="root does not verify"):
        fleet.refresh(thief.mirror())


def test_a_device_offline_for_two_years_walks_300_rotations(fleet: Fleet) -> None:
    """Among them a lost key (within the threshold) and all root keys replaced after a theft above it."""
    repository = fleet.repository
    for number in range(300):
        old = repository.keys["root"]
        if number == 100:
            keys = [*old[:2], new_key()]  # the third is lost: the other two sign
            repository.replace_root_keys(keys, signers=keys)
        elif number == 200:
            fresh = [new_key() for _ in range(3)]
            repository.replace_root_keys(fresh, signers=[*old[:2], *fresh[:2]])
        else:
            repository.next_root(signers=old[:2])
    fleet.now = NOW + datetime.timedelta(days=730)
    later = fleet.now + datetime.timedelta(days=7)
    repository.next_root(lambda root: setattr(root, "expires", later))
    for part in (repository.timestamp, repository.snapshot, *repository.roles.values()):
        part.expires = later
    repository.release()
    assert not fleet.device.state().can_update
    assert fleet.refresh().versions["root"] == 302
    assert fleet.device.state().can_update


def test_a_gap_in_the_roots_is_not_jumped(fleet: Fleet) -> None:
    repository = fleet.repository
    for _ in range(5):
        repository.next_root()
    repository.replace_key("timestamp")
    repository.release()
    del repository.files["metadata/3.root.json"]
    with pytest.raises(TrustError, match="timestamp does not verify"):
        fleet.refresh()
    assert fleet.versions()["root"] == 2


def test_malicious_mirrors_are_passed_over(fleet: Fleet, tmp_path: Path) -> None:
    """Of five mirrors four are dead, empty, lying or endless; the device gets what was signed."""
    fleet.repository.add(PATH, b"newest")
    fleet.repository.release()
    lying, endless = HostileRepository().mirror(), fleet.repository.mirror()
    endless.endless.add("metadata/timestamp.json")
    bad = fleet.repository.mirror()
    bad.files |= {name: b"evil!!" for name in bad.files if name.startswith("targets/")}
    mirrors = (DeadMirror({}), MemoryMirror({}), lying, endless, bad, fleet.repository.mirror())
    assert fleet.fetch(tmp_path, *mirrors) == b"newest"


def test_malicious_mirrors_alone_change_nothing(fleet: Fleet) -> None:
    fleet.refuses(SourceError, "dead", MemoryMirror({}), DeadMirror({}))
    with pytest.raises(TrustError, match="no timestamp metadata"):
        fleet.refresh(MemoryMirror({}))


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[" * 5_000,
        b'{"signed": {}, "signatures": []}',
        b'{"signed": {"_type": "root"}, "signatures": [{}]}',
        b'{"signed": {"_type": "timestamp", "version": -1}, "signatures": []}',
        b'{"signed": 1, "signatures": {"a": NaN}}',
    ],
)
@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json"])
def test_malformed_metadata_is_one_sentence(fleet: Fleet, name: str, lie: bytes) -> None:
    fleet.repository.files[f"metadata/{name}"] = lie
    fleet.refuses(TrustError, "does not verify")


def test_delegations_in_a_circle_and_without_end_are_bounded(fleet: Fleet) -> None:
    repository = fleet.repository
    for number in range(60):
        parent = "adapters" if number == 0 else f"deep-{number - 1}"
        repository.delegate(parent, f"deep-{number}", ["adapters/*"], [new_key()])
    repository.delegate("deep-59", "adapters", ["adapters/*"], repository.keys["adapters"])
    repository.release()
    mirror = repository.mirror()
    with pytest.raises(NotFound):
        asyncio.run(fleet.device.target("adapters/none", running=LICHEN, mirrors=[mirror]))
    assert sum("deep-" in name for name in mirror.asked) <= 33


def test_a_role_below_the_kind_may_vouch_for_it(fleet: Fleet) -> None:
    repository = fleet.repository
    repository.delegate("adapters", "oslo", ["adapters/oslo-*"], [new_key()])
    repository.add("adapters/oslo-1", b"lora", role="oslo")
    repository.release()
    got = asyncio.run(fleet.device.target("adapters/oslo-1", running=LICHEN, mirrors=[repository.mirror()]))
    assert got.manifest.kind == "adapters"


def test_a_target_whose_manifest_lies_about_its_size_is_refused(fleet: Fleet) -> None:
    fleet.repository.add("models/liar", b"1234", size=5)
    fleet.repository.release()
    with pytest.raises(TrustError, match="has 4 bytes, but its manifest 5"):
        asyncio.run(fleet.device.target("models/liar", running=LICHEN, mirrors=[fleet.repository.mirror()]))


def test_a_targets_file_of_another_type_is_refused(fleet: Fleet) -> None:
    """The timestamp's bytes under the name of the snapshot, and a role signed as another role."""
    repository = fleet.repository
    repository.release()
    repository.files[f"metadata/{repository.snapshot.version}.snapshot.json"] = repository.files[
        "metadata/timestamp.json"
    ]
    with pytest.raises(TrustError, match="snapshot does not verify"):
        fleet.refresh()
    stray = Targets(9, expires=NOW, targets={PATH: TargetFile(1, {"sha256": "0" * 64}, PATH)})
    repository.files["metadata/timestamp.json"] = signed(stray, repository.keys["timestamp"])
    with pytest.raises(TrustError, match="Expected 'timestamp', got 'targets'"):
        fleet.refresh()
