"""The publisher's repository on disk, seen by devices that read its static files, also when it is killed."""

from __future__ import annotations

import datetime
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    SecretsHandler,
    Signature,
    Signer,
)
from tuf.api.metadata import Metadata

from lichen.errors import FleetError, NotFound
from lichen.sync.manifest import AnyManifest, make_manifest
from lichen.sync.trust.device import Device, FleetTarget
from lichen.sync.trust.enrolment import Enrolment, write_enrolment
from lichen.sync.trust.fetching import FolderFetcher
from lichen.sync.trust.publisher import Publisher
from lichen.sync.trust.signers import Signers
from tests.sync.hostile_repository import NOW, manifest

RUNNING = "0.1.0"
ROOT = Path(__file__).resolve().parents[2]


class Studio:
    """A publisher, a file to publish, and a device that reads the folder as its mirror."""

    def __init__(self, folder: Path, *, passphrase: str = "correct horse") -> None:
        self.folder, self.now = folder, NOW
        self.passphrase = passphrase
        self.mirror = FolderFetcher(folder / "repository")
        self.device = Device(folder / "device", clock=lambda: self.now)
        self.file = folder / "weights"

    def publisher(self) -> Publisher:
        signers = Signers(self.folder / "keys", lambda: self.passphrase)
        return Publisher(self.folder / "repository", signers, clock=lambda: self.now)

    def init(self) -> None:
        root = self.publisher().init()
        bundle = Enrolment(fleet="moss", root=root, mirrors=((self.folder / "repository").as_uri(),))
        self.device.enrol(write_enrolment(bundle))

    def manifest(self, path: str) -> AnyManifest:
        return make_manifest(manifest(path, self.file.stat().st_size), running=RUNNING)

    def publish(self, path: str, data: bytes) -> None:
        self.file.write_bytes(data)
        self.publisher().publish(self.file, self.manifest(path))

    async def seen(self, path: str, device: Device | None = None) -> bytes:
        """What a device gets of a target."""
        device = device or self.device
        target: FleetTarget = await device.target(path, running=RUNNING, mirrors=[self.mirror])
        await device.download(target, self.folder / "got", [self.mirror])
        return (self.folder / "got").read_bytes()

    def newcomer(self) -> Device:
        """A device that trusts nothing but the first root."""
        device = Device(self.folder / "newcomer", clock=lambda: self.now)
        bundle = write_enrolment(self.device.enrolment())
        device.enrol(bundle, replace=True)
        return device

    def files(self) -> dict[str, bytes]:
        folder = self.folder / "repository"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    studio = Studio(tmp_path)
    studio.init()
    return studio


async def test_publish_replace_and_withdraw(studio: Studio) -> None:
    studio.publish("models/small", b"one")
    studio.publish("adapters/support", b"lora")
    assert await studio.seen("models/small") == b"one"
    assert await studio.seen("adapters/support") == b"lora"
    studio.publish("models/small", b"two")
    assert await studio.seen("models/small") == b"two"
    studio.publisher().withdraw("models/small")
    with pytest.raises(NotFound, match="no target 'models/small'"):
        await studio.seen("models/small")
    with pytest.raises(FleetError, match="no target 'models/none'"):
        studio.publisher().withdraw("models/none")
    with pytest.raises(FleetError, match="already a repository"):
        studio.publisher().init()


def test_no_file_but_the_timestamp_is_written_twice(studio: Studio) -> None:
    studio.publish("models/small", b"one")
    before = studio.files()
    studio.publish("models/small", b"two")
    studio.publisher().rotate("snapshot")
    after = studio.files()
    changed = [name for name, data in before.items() if after[name] != data]
    assert changed == ["metadata/timestamp.json"]
    assert not [name for name in after if name.rpartition("/")[2].startswith(".")], (
        "nothing half-made is left"
    )


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", "models", "adapters"])
async def test_devices_follow_the_rotation_of_any_role(studio: Studio, role: str) -> None:
    studio.publish("models/small", b"one")
    assert await studio.seen("models/small") == b"one"
    old = next(row for row in studio.publisher().roles() if row.role == role)
    studio.publisher().rotate(role)
    new = next(row for row in studio.publisher().roles() if row.role == role)
    assert not {key["id"] for key in old.keys} & {key["id"] for key in new.keys}
    assert len(old.keys) == len(new.keys)
    studio.publish("models/small", b"two")
    assert await studio.seen("models/small") == b"two"
    assert await studio.seen("models/small", studio.newcomer()) == b"two"


async def test_one_lost_root_key_is_replaced_and_two_are_too_many(studio: Studio) -> None:
    keys = studio.folder / "keys"
    (keys / "root-2.pem").unlink()
    assert studio.publisher().rotate("root", ["root-2"]) == ["root-4"]
    await studio.device.refresh([studio.mirror])
    names = {k["name"] for row in studio.publisher().roles() if row.role == "root" for k in row.keys}
    assert names == {"root-1", "root-3", "root-4"}
    for name in ("root-1", "root-3"):
        (keys / f"{name}.pem").unlink()
    before = studio.files()
    with pytest.raises(FleetError, match="cannot be read"):
        studio.publisher().rotate("root", ["root-1"])
    with pytest.raises(FleetError, match="'root-9' is no root key"):
        studio.publisher().rotate("root", ["root-9"])
    assert studio.files() == before


async def test_a_timestamp_is_renewed_without_any_other_key(studio: Studio) -> None:
    for key in (studio.folder / "keys").glob("*.pem"):
        if key.stem != "timestamp":
            key.unlink()
    studio.now += datetime.timedelta(days=6)
    studio.publisher().renew()
    studio.now += datetime.timedelta(days=6)
    await studio.device.refresh([studio.mirror])
    assert studio.device.state().can_update
    with pytest.raises(FleetError, match=r"key file .*snapshot"):
        studio.publisher().renew(["snapshot"])


def test_key_files_are_encrypted_and_a_wrong_passphrase_is_said(studio: Studio) -> None:
    for key in (studio.folder / "keys").glob("*.pem"):
        assert key.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert key.stat().st_mode & 0o077 == 0
    studio.passphrase = "wrong horse"
    before = studio.files()
    with pytest.raises(FleetError, match="does not open with this passphrase"):
        studio.publish("models/small", b"one")
    assert {n: d for n, d in studio.files().items() if not n.startswith("targets/")} == before
    short = Studio(studio.folder / "short", passphrase="short")
    with pytest.raises(FleetError, match="too short"):
        short.publisher().init()


class StandIn(Signer):
    """A hardware signer that holds its own key: `stand-in:<slot>`."""

    slots: ClassVar[dict[str, CryptoSigner]] = {}

    def __init__(self, held: CryptoSigner) -> None:
        self._held = held

    @property
    def public_key(self) -> Key:
        return self._held.public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> StandIn:
        return cls(cls.slots[priv_key_uri.partition(":")[2]])

    def sign(self, payload: bytes) -> Signature:
        return self._held.sign(payload)


async def test_a_hardware_signer_is_one_line(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key moves from its file into hardware: the same public key, another line in signers.toml."""
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "stand-in", StandIn)
    keys = studio.folder / "keys"
    held = Signers(keys, lambda: studio.passphrase).signer("models")
    assert isinstance(held, CryptoSigner)
    monkeypatch.setitem(StandIn.slots, "7", held)
    (keys / "models.pem").unlink()
    lines = (keys / "signers.toml").read_text()
    (keys / "signers.toml").write_text(lines.replace('"lichen-file:models.pem"', '"stand-in:7"'))
    studio.publish("models/small", b"one")
    assert await studio.seen("models/small") == b"one"
    monkeypatch.delitem(StandIn.slots, "7")
    with pytest.raises(FleetError, match="key models \\(stand-in:\\) cannot be used"):
        studio.publish("models/small", b"two")
    monkeypatch.delitem(SIGNER_FOR_URI_SCHEME, "stand-in")
    with pytest.raises(FleetError, match="No signer is known for stand-in:"):
        studio.publish("models/small", b"two")
    (keys / "signers.toml").write_text("models = 3\n")
    with pytest.raises(FleetError, match="is not a URI"):
        studio.publish("models/small", b"two")


KILLED = """
import os, pathlib, signal, sys
from tests.sync.test_publisher import Studio
at, step = int(sys.argv[2]), sys.argv[3]
studio = Studio(pathlib.Path(sys.argv[1]))
replace, done = pathlib.Path.replace, 0
def deadly(self, target):
    global done
    done += 1
    if done == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = deadly
if step == "publish":
    studio.publish("models/small", b"two")
else:
    studio.publisher().rotate(step)
"""


@pytest.mark.parametrize(
    ("step", "at"), [("publish", at) for at in (1, 2, 3, 4)] + [("timestamp", at) for at in (4, 5, 6)]
)
async def test_kill_9_between_any_two_files_leaves_a_valid_repository(
    studio: Studio, step: str, at: int
) -> None:
    """Each rename of a step is where the process dies in turn; old and new devices still verify, and the step
    can be done again."""
    studio.publish("models/small", b"one")
    assert await studio.seen("models/small") == b"one"
    killed = [sys.executable, "-c", KILLED, str(studio.folder), str(at), step]
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for device in (studio.device, studio.newcomer()):
        assert await studio.seen("models/small", device) == b"one"
    again: dict[str, Callable[[], object]] = {"publish": lambda: studio.publish("models/small", b"two")}
    again.get(step, lambda: studio.publisher().rotate(step))()
    expected = b"two" if step == "publish" else b"one"
    for device in (studio.device, studio.newcomer()):
        assert await studio.seen("models/small", device) == expected


def test_a_damaged_repository_or_manifest_is_said(studio: Studio) -> None:
    studio.file.write_bytes(b"longer")
    wrong = make_manifest(manifest("models/small", 3), running=RUNNING)
    with pytest.raises(FleetError, match="has 6 bytes, but its manifest says 3"):
        studio.publisher().publish(studio.file, wrong)
    with pytest.raises(FleetError, match="cannot be read"):
        studio.publisher().publish(studio.folder / "none", wrong)
    for threshold, count in ((0, 1), (3, 2), (1, 17)):
        with pytest.raises(FleetError, match="cannot be"):
            studio.publisher().init(root_keys=count, threshold=threshold)
    (studio.folder / "repository/metadata/timestamp.json").write_bytes(b"{")
    with pytest.raises(FleetError, match=r"timestamp\.json is damaged"):
        studio.publisher().renew()


def test_public_keys_stand_in_the_root_and_private_ones_nowhere(studio: Studio) -> None:
    root = Metadata.from_file(str(studio.folder / "repository/metadata/1.root.json"))
    signers = Signers(studio.folder / "keys", lambda: studio.passphrase)
    assert set(signers.names()) > set(root.signed.roles["root"].keyids)
    held = signers.signer("root-1")
    assert isinstance(held, CryptoSigner)
    raw = held._private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    assert raw in studio.files()["metadata/1.root.json"].decode()
    assert not any(b"PRIVATE" in data for data in studio.files().values())
