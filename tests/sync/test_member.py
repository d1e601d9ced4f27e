"""A machine of a real fleet: a publisher's folder behind a file server, chunks, rollouts, lies, a stick."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lichen.errors import (
    FleetError,
    LichenError,
    MetadataExpired,
    OfflineError,
    SourceError,
)
from lichen.sync.manifest import make_manifest
from lichen.sync.reporting.wire import UpdateReport
from lichen.sync.rollout import DeviceFacts, Policy, Wave, pause, resume, roll_back, stop
from lichen.sync.store import Store
from lichen.sync.trust.bringing import FleetSupply
from lichen.sync.trust.device import Device
from lichen.sync.trust.enrolment import Enrolment, write_enrolment
from lichen.sync.trust.exporting import export
from lichen.sync.trust.member import Member, Served, planned
from lichen.sync.trust.publisher import Publisher
from lichen.sync.trust.rollouts import Rollouts
from lichen.sync.trust.signers import Signers
from lichen.sync.updates.slots import Slot
from tests.sync.hostile_repository import NOW, manifest
from tests.sync.range_server import RangeServer
from tests.sync.rollouts import NEW, OLD, policy
from tests.sync.update_bench import Oracle
from tests.sync.weights import gguf_of, nudged, weights

RUNNING = "0.1.0"
FIRST = weights(layers=5)
SECOND = FIRST | {"blk.1.ffn_up.weight": nudged(FIRST["blk.1.ffn_up.weight"], 0.01)}


class Studio:
    """A publisher, a server over its folder, and machines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, NOW
        self.repository = folder / "repository"
        signers = Signers(folder / "keys", lambda: "correct horse")
        self.publisher = Publisher(self.repository, signers, clock=lambda: self.now)
        self.root = self.publisher.init()
        self.rollouts = Rollouts(
            self.publisher, self.repository, folder / "rollouts.lock", clock=lambda: self.now
        )
        self.server = RangeServer(self.repository)
        self.members: list[Member] = []
        self.oracle = Oracle()
        self.held = ""  # the state in which updates wait

    def seconds(self) -> float:
        return self.now.timestamp()

    def publish(self, path: str, data: bytes, **more: object) -> None:
        file = self.folder / "weights"
        file.write_bytes(data)
        fields = manifest(path, len(data), **more)
        self.publisher.publish(file, make_manifest(fields, running=RUNNING))

    def device(self, name: str = "device", url: str = "") -> Device:
        device = Device(self.folder / name / "fleet", clock=lambda: self.now)
        bundle = Enrolment(fleet="moss", root=self.root, mirrors=(url or self.server.url,))
        device.enrol(write_enrolment(bundle))
        return device

    def store(self, name: str = "device", *, offline: bool = False) -> Store:
        return Store(self.folder / name / "store", offline=offline)

    def member(self, name: str = "device", urls: tuple[str, ...] = (), *, offline: bool = False) -> Member:
        member = Member(
            self.device(name),
            self.folder / name / "fleet",
            self.store(name, offline=offline),
            self.oracle,
            running=RUNNING,
            clock=self.seconds,
            urls=urls,
            permit=lambda update: "later" if update.state == self.held else "",
        )
        self.members.append(member)
        return member

    def serves(self, slot: str, name: str = "device") -> bytes:
        store = self.store(name)
        return store.blob(store.slots.serving(slot).sha256).read_bytes()

    def asked(self, folder: str) -> int:
        """Bytes that ranges of files below a folder of the mirror asked for."""
        total = 0
        for path, span in self.server.requests:
            if path.startswith(f"/{folder}/") and span:
                first, _, last = span.removeprefix("bytes=").partition("-")
                total += int(last) - int(first) + 1
        return total


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setattr("lichen.sync.transfer.CYCLES", 1)  # a mirror that lies is asked less often
    studio = Studio(tmp_path)
    yield studio
    for member in studio.members:
        member.close()
    studio.server.close()


async def test_only_what_changed_is_fetched(studio: Studio) -> None:
    studio.publish("models/it", gguf_of(FIRST))
    member = studio.member()
    await member.pull(["models/it"])
    assert studio.serves("models/it") == gguf_of(FIRST)
    studio.server.requests.clear()
    studio.publish("models/it", gguf_of(SECOND))
    (outcome,) = await member.pull()
    assert outcome.update is not None
    assert outcome.update.state == "confirmed"
    assert studio.serves("models/it") == gguf_of(SECOND)
    assert 0 < studio.asked("packs") <= 0.15 * len(gguf_of(SECOND)), "one tensor of six, as a difference"
    assert not studio.asked("targets")
    studio.server.requests.clear()
    assert await member.pull() == [type(outcome)(assignment=outcome.assignment)]
    assert not [path for path, _ in studio.server.requests if not path.startswith("/metadata/")]


@pytest.mark.parametrize("lie", ["recipe", "other recipe", "packs", "no packs", "no recipe"])
async def test_a_mirror_that_lies_about_chunks_costs_only_bytes(studio: Studio, lie: str) -> None:
    studio.publish("models/it", gguf_of(FIRST))
    (recipe,) = (studio.repository / "recipes").iterdir()
    (pack,) = (studio.repository / "packs").iterdir()
    if lie == "recipe":
        recipe.write_bytes(recipe.read_bytes()[:-1] + b"x")
    elif lie == "other recipe":
        studio.publish("models/other", gguf_of(SECOND))
        other = next(path for path in (studio.repository / "recipes").iterdir() if path != recipe)
        recipe.write_bytes(other.read_bytes())
    elif lie == "packs":
        pack.write_bytes(bytes(pack.stat().st_size))
    else:
        (pack if lie == "no packs" else recipe).unlink()
    await studio.member().pull(["models/it"])
    assert studio.serves("models/it") == gguf_of(FIRST)


async def test_where_everything_lies_nothing_is_taken(studio: Studio) -> None:
    studio.publish("models/it", gguf_of(FIRST))
    for path in (*(studio.repository / "packs").iterdir(), *(studio.repository / "targets/models").iterdir()):
        path.write_bytes(bytes(path.stat().st_size))
    (outcome,) = await studio.member().pull(["models/it"])
    assert outcome.update is not None
    assert (outcome.update.state, bool(outcome.error)) == ("downloading", True)
    assert not list((studio.store().root / "blobs").rglob("*.gguf"))
    with pytest.raises(LichenError):
        studio.serves("models/it")


async def test_a_full_disk_stops_the_download_and_is_said(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    studio.publish("models/it", gguf_of(FIRST))
    member = studio.member()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 5_000))
    (outcome,) = await member.pull(["models/it"])
    assert "MB free" in outcome.error
    monkeypatch.undo()
    await member.pull(["models/it"])
    assert studio.serves("models/it") == gguf_of(FIRST)


async def test_what_a_version_answered_is_reported(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_of(FIRST)
    studio.publish("models/it", data)
    member = studio.member()
    reports: list[UpdateReport] = []
    monkeypatch.setattr(member.reporter, "put", reports.append)
    await member.pull(["models/it"])
    confirmed = reports[-1]
    assert (confirmed.state, confirmed.requests) == ("confirmed", 0)
    studio.now += datetime.timedelta(hours=1)
    member.served({hashlib.sha256(data).hexdigest(): Served(50, 3), "0" * 64: Served(9, 9)})
    member.served({hashlib.sha256(data).hexdigest(): Served()})
    (answered,) = reports[reports.index(confirmed) + 1 :]
    assert (answered.requests, answered.errors) == (50, 3)
    assert answered.at == studio.seconds()
    assert (answered.sha256, answered.quality) == (confirmed.sha256, confirmed.quality), "nothing gets lost"


async def test_expiry_stops_updates_and_never_serving(studio: Studio) -> None:
    studio.publish("models/it", gguf_of(FIRST))
    member = studio.member()
    await member.pull(["models/it"])
    studio.now += datetime.timedelta(days=800)
    with pytest.raises(MetadataExpired):
        await member.pull()
    assert studio.serves("models/it") == gguf_of(FIRST)
    assert studio.store().resolve("fleet:it") is not None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"min_lichen": "9.0"}, "needs lichen 9.0"),
        ({"health": {"prompts": [], "unknown": 1}}, "malformed"),
        ({"health": "{"}, "malformed"),
        ({"health": '{"seconds": 1e9}'}, "malformed"),
        ({"health": {"prompts": [{"text": "x" * 20_000}]}}, "malformed"),
        ({"recipe": {"sha256": "no", "size": 1}}, "malformed"),
        ({"recipe": {"sha256": "a" * 64, "size": 1 << 40}}, "malformed"),
        ({"size": 7}, "has 1 bytes, but its manifest"),
    ],
)
async def test_a_hostile_manifest_is_refused_before_a_byte(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], sentence: str
) -> None:
    """Signed by the right key all the same: a publisher can err, or be made to."""
    monkeypatch.setattr(
        "lichen.sync.trust.publisher.custom_of", lambda _manifest: manifest("models/it", 1, **change)
    )
    studio.publish("models/it", b"x")
    (outcome,) = await studio.member().pull(["models/it"])
    assert sentence in outcome.error
    assert outcome.update is None
    assert not [path for path, _ in studio.server.requests if path.startswith("/targets/")]


async def test_a_rollout_leads_there_and_back(studio: Studio) -> None:
    studio.publish("models/it-1", gguf_of(FIRST))
    studio.publish("models/it-2", gguf_of(SECOND))
    studio.rollouts.start("models", "it", "1", (Wave(),))
    member = studio.member()
    await member.pull()
    assert studio.serves("models/it") == gguf_of(FIRST)
    studio.rollouts.start("models", "it", "2", (Wave(percent=100.0),))
    await member.pull()
    assert studio.serves("models/it") == gguf_of(SECOND)
    studio.server.requests.clear()
    studio.rollouts.change("it", lambda it: roll_back(it, "slower"))
    (outcome,) = await member.pull()
    assert outcome.update is not None
    assert (outcome.update.target, outcome.update.rollout) == ("models/it-1", "it")
    assert studio.serves("models/it") == gguf_of(FIRST)
    assert not studio.asked("packs"), "the old version was kept"


async def test_a_rollout_that_is_taken_back_leaves_nothing(studio: Studio) -> None:
    studio.publish("mixtures/it-1", b"{}")
    studio.rollouts.start("mixtures", "it", "1", (Wave(),))
    member = studio.member()
    await member.pull()
    assert studio.serves("mixtures/it") == b"{}"
    studio.rollouts.change("it", roll_back)
    await member.pull()
    with pytest.raises(LichenError, match="Nothing is here"):
        studio.serves("mixtures/it")


@pytest.mark.parametrize(
    ("held", "change"),
    [
        ("offered", roll_back),
        ("downloading", pause),
        ("staged", stop),
        ("active", pause),
        ("active", roll_back),
    ],
)
async def test_an_update_under_way_ends_with_its_rollout(
    studio: Studio, held: str, change: Callable[[Policy], Policy]
) -> None:
    studio.publish("mixtures/it-1", b"{}")
    studio.publish("mixtures/it-2", b"[]")
    studio.rollouts.start("mixtures", "it", "1", (Wave(),))
    member = studio.member()
    await member.pull()
    studio.rollouts.start("mixtures", "it", "2", (Wave(),))
    studio.held = held
    (outcome,) = await member.pull()
    assert outcome.waiting == "later"
    studio.held = ""
    studio.rollouts.change("it", change)
    assert await member.pull() == []
    update = member.updater.ledger.latest()["mixtures/it"]
    assert (update.state, update.cause) == ("rolled_back", "cancelled")
    assert "Its rollout says: the rollout is" in update.reason
    assert studio.serves("mixtures/it") == b"{}"
    if change is pause:
        studio.rollouts.change("it", resume)
        await member.pull()
        assert studio.serves("mixtures/it") == b"[]", "no mark against the version"


async def test_a_long_download_ends_when_its_rollout_does(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lichen.sync.trust.member.WATCH_S", 0.1)
    studio.publish("models/it-1", gguf_of(FIRST))
    studio.rollouts.start("models", "it", "1", (Wave(),))
    member = studio.member()
    pulling = asyncio.ensure_future(member.pull())
    studio.server.pause = 0.5  # for each 64 KiB
    while "models/it" not in member.updater.ledger.latest():
        await asyncio.sleep(0.01)
    studio.rollouts.change("it", pause)
    (outcome,) = await pulling
    assert outcome.update is not None
    assert (outcome.update.state, outcome.update.cause) == ("rolled_back", "cancelled")


@pytest.mark.parametrize("held", ["offered", "active"])
async def test_what_was_begun_is_ended_by_the_next_pull(studio: Studio, held: str) -> None:
    """Also a trial in which the process died, and a wish that nothing is in use of yet."""
    studio.publish("mixtures/it-1", b"{}")
    studio.publish("mixtures/wish", b"[]")
    studio.rollouts.start("mixtures", "it", "1", (Wave(),))
    member, studio.held = studio.member(), held
    await member.pull(["mixtures/wish"])
    studio.held = ""
    await member.pull()
    states = {slot: update.state for slot, update in member.updater.ledger.latest().items()}
    assert states == {"mixtures/it": "confirmed", "mixtures/wish": "confirmed"}


async def test_a_stick_brings_what_the_network_would(studio: Studio, tmp_path: Path) -> None:
    """Every root since the first travels too: the importing machine knows only that."""
    studio.publish("models/it", gguf_of(FIRST))
    await studio.member().pull(["models/it"])
    studio.publisher.rotate("root")
    studio.publisher.rotate("models")
    stick = tmp_path / "stick"
    done = await export(studio.device(), studio.store(), stick, running=RUNNING)
    assert done == ["models/it"]
    studio.server.close()
    away = studio.member("away", (stick.as_uri(),), offline=True)
    await away.pull(["models/it"])
    assert studio.serves("models/it", "away") == gguf_of(FIRST)
    target = next((stick / "targets" / "models").iterdir())
    target.write_bytes(bytes(target.stat().st_size))
    wary = studio.member("wary", (stick.as_uri(),), offline=True)
    (outcome,) = await wary.pull(["models/it"])
    assert outcome.error
    with pytest.raises(FleetError, match="no target 'models/none'"):
        await export(
            studio.device("x", stick.as_uri()), studio.store(), stick, ["models/none"], running=RUNNING
        )
    studio.now += datetime.timedelta(days=8)
    with pytest.raises(MetadataExpired):
        await away.pull(["models/it"])


async def test_offline_is_a_hard_rule(studio: Studio) -> None:
    supply = FleetSupply(studio.device(), studio.store(offline=True), running=RUNNING)
    with pytest.raises(OfflineError):
        await supply.find("models/it")


async def test_a_mirror_that_is_gone_is_said(studio: Studio) -> None:
    studio.server.close()
    with pytest.raises(SourceError):
        await studio.member().pull()


def test_the_plan() -> None:
    """A rollout's word counts over a wish, and what is in use is kept up to date without either."""

    def plan(policies: list[Policy], targets: list[str], **slots: Slot) -> dict[str, str]:
        def facts(slot: Slot) -> DeviceFacts:
            return DeviceFacts(id="d", active=None if slot.active is None else slot.active.sha256)

        kept = {f"adapters/{name}": slot for name, slot in slots.items()}
        made = planned(policies, targets, kept, {}, facts, NOW.timestamp())
        return {each.slot: each.target for each in made.assignments}

    assert plan([], []) == {}
    assert plan([policy(100)], ["adapters/support", "models/it"]) == {
        "adapters/support": NEW.path,
        "models/it": "models/it",
    }
    assert plan([policy(100, state="rolled_back")], []) == {"adapters/support": OLD.path}
    assert plan([policy(100, opened=0, previous=None)], ["adapters/support"]) == {}
    with pytest.raises(FleetError, match="is no target"):
        plan([], ["it"])
