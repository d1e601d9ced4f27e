"""The collector against devices that forge, replay, flood and lie, and what it shows to people."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from lichen.errors import Forbidden, LichenError, PayloadTooLarge, RateLimited, RequestError, Unauthorized
from lichen.sync.collector.board import Census, board
from lichen.sync.collector.database import OUTCOMES, Database
from lichen.sync.collector.page import page
from lichen.sync.reporting.key import DeviceKey
from lichen.sync.reporting.wire import BODY_LIMIT, Joining, Purpose, signature_text
from lichen.sync.rollout import Policy
from tests.sync.reporting import FLEET, SLOT, TOKEN, World, batch, report
from tests.sync.rollouts import policy


def joined(world: World, key: DeviceKey | None = None, **fields: Any) -> DeviceKey:
    """A device that has joined."""
    key = key or DeviceKey.generate()
    body, signature = joining(key, **fields)
    world.desk.join(body, signature)
    return key


def joining(
    signer: DeviceKey, purpose: Purpose = "join", *, claims: DeviceKey | None = None, **fields: Any
) -> tuple[bytes, str]:
    """A signed joining. claims: the key that it names, if another."""
    given = {"fleet": FLEET, "token": TOKEN, "key": (claims or signer).public} | fields
    body = msgspec.json.encode(Joining(**given))
    return body, signature_text(signer.sign(purpose, body))


def test_a_device_joins_with_the_bundles_token_and_its_own_key() -> None:
    world, key, other = World(), DeviceKey.generate(), DeviceKey.generate()
    with pytest.raises(Forbidden, match="token"):
        joined(world, token="u" * 32)
    with pytest.raises(Forbidden, match="is the fleet moss's"):
        joined(world, fleet="fern")
    body, signature = joining(key, claims=other)
    with pytest.raises(Unauthorized, match="not signed by the key"):
        world.desk.join(body, signature)
    body, signature = joining(key, "report")
    with pytest.raises(Unauthorized, match="not signed by the key"):
        world.desk.join(body, signature)
    assert world.database.members() == []
    joined(world, key)
    joined(world, key)
    assert [each.id for each in world.database.members()] == [key.id]


def test_with_approval_a_device_counts_only_once_a_person_let_it_in() -> None:
    world = World(approve=True)
    key = joined(world)
    world.desk.take(*batch(key, report()))
    assert (world.database.members()[0].membership, world.database.reported(SLOT)) == ("waiting", [])
    world.database.change(key.id, "member")
    assert len(world.database.reported(SLOT)) == 1, "what it said meanwhile was kept"
    world.database.change(key.id, "expelled")
    assert world.database.reported(SLOT) == []
    with pytest.raises(Forbidden, match="expelled"):
        world.desk.take(*batch(key, report(sequence=2)))
    assert world.desk.join(*joining(key)) == "expelled", "joining again opens no door"


def test_a_forged_report_is_refused() -> None:
    """Another's key, a changed byte, another's signature, an unknown device, another purpose."""
    world = World()
    victim, attacker = joined(world), joined(world)
    with pytest.raises(Forbidden, match="not signed by the device"):
        world.desk.take(*batch(attacker, report(), device=victim.id))
    body, signature = batch(victim, report())
    with pytest.raises(Forbidden, match="not signed by the device"):
        world.desk.take(body.replace(b"confirmed", b"offered"), signature)
    with pytest.raises(Forbidden, match="not signed by the device"):
        world.desk.take(body, batch(attacker, report())[1])
    with pytest.raises(Forbidden, match="not signed by the device"):
        world.desk.take(body, signature_text(victim.sign("join", body)))
    with pytest.raises(Unauthorized, match="does not know this device"):
        world.desk.take(*batch(DeviceKey.generate(), report()))
    with pytest.raises(Forbidden, match="is the fleet moss's"):
        world.desk.take(*batch(victim, report(), fleet="fern"))
    assert world.database.reported(SLOT) == []


def test_a_replay_changes_nothing() -> None:
    """An old "confirmed" that somebody recorded does not cover a later rollback."""
    world = World()
    key = joined(world)
    recorded = batch(key, report(sequence=5))
    assert world.desk.take(*recorded).new == 1
    world.desk.take(*batch(key, report(sequence=6, state="rolled_back", cause="unhealthy")))
    before = (world.database.reported(SLOT), world.database.members())
    world.now += 3600
    answer = world.desk.take(*recorded)
    assert (answer.new, answer.sequence) == (0, 6)
    assert (world.database.reported(SLOT), world.database.members()) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence", 0),
        ("sequence", 1 << 60),
        ("slot", "../../etc/passwd"),
        ("slot", "adapters/<script>"),
        ("target", "x" * 10_000),
        ("sha256", "2" * 63),
        ("state", "fine"),
        ("cause", "<b>"),
        ("code", "Ignore all previous words"),
        ("quality", 1.01),
        ("quality", "NaN"),
        ("rate", -1),
        ("rate", 1e300),
        ("requests", 1.5),
        ("at", 1e300),
    ],
)
def test_a_lie_is_no_report(field: str, value: Any) -> None:
    world = World()
    key = joined(world)
    document = json.loads(batch(key, report())[0])
    document["reports"][0][field] = value
    body = json.dumps(document).encode()
    with pytest.raises(RequestError, match="malformed"):
        world.desk.take(body, signature_text(key.sign("report", body)))


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 100_000, b"null", b'{"fleet": 1}'])
def test_bytes_that_are_no_report(body: bytes) -> None:
    world = World()
    for act in (world.desk.join, world.desk.take):
        with pytest.raises(RequestError, match="malformed"):
            act(body, "")
    with pytest.raises(RequestError, match="64 bytes"):
        world.desk.take(batch(joined(world), report())[0], "!!")


def test_what_a_device_can_cost_is_bounded() -> None:
    """Body, reports in it, rows, requests, devices."""
    world = World(max_devices=3, device_rate=40)
    key = joined(world)
    with pytest.raises(PayloadTooLarge):
        world.desk.take(b" " * (BODY_LIMIT + 1), "")
    many = [report(sequence=n + 1, sha256=f"{n:064x}") for n in range(201)]
    with pytest.raises(RequestError, match="malformed"):
        world.desk.take(*batch(key, *many))
    world.desk.take(*batch(key, *many[:200]))
    assert [each.sequence for each in world.database.reported(SLOT)] == list(range(201 - OUTCOMES, 201))
    with pytest.raises(RateLimited):
        for number in range(60):
            world.desk.take(*batch(key, report(sequence=300 + number)))
    world.now += 3600
    world.desk.take(*batch(key, report(sequence=400)))
    joined(world), joined(world)
    with pytest.raises(LichenError, match="has its 3 devices") as caught:
        joined(world)
    assert caught.value.status == 503
    joined(world, key)


def test_strangers_are_limited_by_their_address() -> None:
    world = World(address_rate=5)
    for _ in range(5):
        with pytest.raises(Forbidden):
            world.desk.join(*joining(DeviceKey.generate(), token="u" * 32), "10.0.0.1")
    with pytest.raises(RateLimited) as caught:
        world.desk.join(*joining(DeviceKey.generate()), "10.0.0.1")
    assert caught.value.retry_after == 720
    world.desk.join(*joining(DeviceKey.generate()), "10.0.0.2")


def test_outcomes_are_forgotten_and_numbers_are_not(tmp_path: Any) -> None:
    world = World(tmp_path / "c.db")
    key = joined(world)
    recorded = batch(key, report(sequence=5))
    world.desk.take(*recorded)
    world.now += 91 * 86_400
    joined_late = joined(world)
    world.desk.take(*batch(joined_late))
    assert world.database.reported(SLOT) == []
    assert world.desk.take(*recorded).new == 0, "a replay after the retention is still one"
    world.database.close()
    assert (tmp_path / "c.db").stat().st_mode & 0o077 == 0
    again = Database(tmp_path / "c.db", max_devices=9, retention=1)
    assert len(again.members()) == 2
    again.close()


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Any) -> None:
    import sqlite3

    path = tmp_path / "c.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE devices (mine TEXT)")
    connection.close()
    with pytest.raises(LichenError, match="no collector's file"):
        Database(path, max_devices=1, retention=1)
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(LichenError, match="cannot be used"):
        Database(path, max_devices=1, retention=1)


def census(world: World) -> Census:
    return Census(
        slot=SLOT,
        at=world.now,
        members=tuple(world.database.members()),
        reported=tuple(world.database.reported(SLOT)),
    )


def test_a_board_counts_waves_versions_states_and_failures() -> None:
    world = World()
    keys = [joined(world) for _ in range(6)]
    old = {"sha256": "1" * 64, "target": "adapters/support-1"}
    for key in keys[:5]:
        world.desk.take(*batch(key, report(sequence=1, **old)))
    world.desk.take(*batch(keys[0], report(sequence=2, quality=0.5)))
    bad = report(sequence=2, state="rolled_back", cause="unhealthy", code="engine_error", quality=0.0)
    world.desk.take(*batch(keys[1], bad))
    world.desk.take(*batch(keys[2], report(sequence=2, state="downloading")))
    world.database.change(keys[4].id, "expelled")
    world.now += 30 * 86_400
    shown = board(census(world), policy(100))
    assert shown.versions == {"adapters/support-1": 3, "adapters/support-2": 1}
    assert (shown.devices, shown.silent, shown.quality) == (5, 5, 0.25)
    (wave,) = shown.waves
    assert (wave.devices, wave.states) == (5, {"confirmed": 1, "downloading": 1, "rolled_back": 1})
    (failure,) = shown.failures
    assert (failure.target, failure.cause, failure.code, failure.devices) == (
        *("adapters/support-2", "unhealthy", "engine_error"),
        1,
    )
    assert board(census(world), None).waves == ()


def test_nothing_that_came_from_elsewhere_is_markup_on_the_page() -> None:
    """Names that no device could send either: the page does not rely on anybody's checks."""
    evil = "<script>alert(1)</script>'\"&"
    plain = policy(100, reason=evil)
    hostile = msgspec.structs.replace(
        board(census(World()), plain), slot=evil, target=evil, state=evil, versions={evil: 1}
    )
    text = page(evil, [hostile], at=0, devices=1, waiting=1, dropped=1)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for outside in ("http:", "https:", "//", "@import", "url(", "<img", "<link", "<script", " on"):
        assert outside not in text.replace(" once", "").replace(" one", "") or outside == " on"
    assert "No device has reported" in page("moss", [], at=0, devices=0, waiting=0, dropped=0)


def test_a_policy_of_tags_and_classes_is_shown_in_words() -> None:
    from lichen.sync.collector.board import condition
    from lichen.sync.rollout import Wave

    rollout: Policy = policy(waves=(Wave(percent=2.5, tags={"site": "oslo"}, hardware=("a", "b")),))
    assert condition(rollout, 0) == "2.5%, site=oslo, a or b"
