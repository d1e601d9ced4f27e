"""The states of an update: their order, their ends, and what serves meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lichen.errors import (
    DiskFull,
    EngineError,
    FleetError,
    MetadataExpired,
    NotFound,
    OutOfMemory,
    SourceError,
)
from lichen.sync.updates.health import Health, Measured, Prompt, verdict
from lichen.sync.updates.states import NEXT, STATES, TIMEOUTS, Assignment, advanced
from tests.adapters.made_adapters import write_made
from tests.models.tiny_models import write_tiny
from tests.sync.update_bench import MODEL, SLOT, Machine
from tests.sync.weights import gguf_of, weights

ASKS = Health(prompts=(Prompt(text="Are you fine?", expects=("fine",)),))


def model(seed: int) -> bytes:
    """A sound GGUF of a few KB."""
    return gguf_of(weights(layers=1, seed=seed))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_a_version_goes_through_every_state(machine: Machine) -> None:
    first = machine.shop.add(SLOT, b"one")
    outcome = await machine.pull()
    assert outcome.update is not None
    assert [state for _, state in machine.seen] == list(STATES[:-1])
    assert (outcome.update.state, machine.serves()) == ("confirmed", b"one")
    assert await machine.pull() == type(outcome)(assignment=outcome.assignment), "nothing is done twice"
    machine.shop.add(SLOT, b"two")
    await machine.pull()
    assert machine.serves() == b"two"
    assert machine.slot().previous is not None
    assert machine.store.blob(first).is_file(), "the previous version is kept"


async def test_versions_that_nothing_names_are_removed(machine: Machine) -> None:
    digests = []
    for number in range(5):
        digests.append(machine.shop.add(SLOT, b"version %d" % number))
        await machine.pull()
    there = [machine.store.blob(digest).is_file() for digest in digests]
    assert there[3:] == [True, True]
    assert there[:2] == [False, False]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"says": "no"}, "answered 0 of 1"),
        ({"rate": 3.0}, "3.0 tokens a second, and 10.0"),
        ({"failure": EngineError("it broke")}, "does not run: it broke"),
        ({"hangs": True}, "took more than 1 s"),
    ],
)
async def test_a_bad_version_is_rolled_back_and_never_tried_again(
    machine: Machine, change: dict[str, Any], match: str
) -> None:
    health = Health(prompts=ASKS.prompts, rate=10.0, seconds=1.0)
    good = machine.shop.add(MODEL, model(1))
    assert (await machine.pull(MODEL, health=health)).error == ""
    bad = machine.shop.add(MODEL, model(2))
    oracle = machine.oracle
    oracle.says |= {bad: change["says"]} if "says" in change else {}
    oracle.rates |= {bad: change["rate"]} if "rate" in change else {}
    oracle.failure |= {bad: change["failure"]} if "failure" in change else {}
    oracle.hangs |= {bad} if "hangs" in change else set()
    outcome = await machine.pull(MODEL, health=health)
    assert outcome.update is not None
    assert (outcome.update.state, outcome.update.cause) == ("rolled_back", "unhealthy")
    assert match in outcome.update.reason
    active = machine.slot(MODEL).active
    assert active is not None
    assert active.sha256 == good
    tries = len(oracle.tried)
    machine.restart()
    assert "not tried again" in (await machine.pull(MODEL, health=health)).error
    assert len(oracle.tried) == tries
    machine.shop.add(MODEL, model(3))
    assert (await machine.pull(MODEL, health=health)).error == "", "a newer version is"


async def test_the_speed_of_the_old_version_is_a_bar(machine: Machine) -> None:
    health = Health(prompts=ASKS.prompts, rate_share=0.8)
    old = machine.shop.add(MODEL, model(1))
    await machine.pull(MODEL, health=health)
    new = machine.shop.add(MODEL, model(2))
    machine.oracle.rates |= {old: 40.0, new: 30.0}
    outcome = await machine.pull(MODEL, health=health)
    assert outcome.update is not None
    assert "30.0 tokens a second, and 32.0" in outcome.update.reason
    assert machine.oracle.tried[-2:] == [old, new]


def test_the_verdict() -> None:
    bar = Health(text="moss", perplexity=10.0, prompts=ASKS.prompts, passes=0.5)
    assert verdict(bar, Measured(asked=3, passed=2, rate=1.0, perplexity=10.0)) == ""
    assert "1 of 3" in verdict(bar, Measured(asked=3, passed=1, perplexity=2.0))
    assert "12.00" in verdict(bar, Measured(perplexity=12.0))
    assert "inf" in verdict(bar, Measured()), "nothing measured is nothing shown"
    assert "nan" in verdict(bar, Measured(perplexity=float("nan")))


async def test_no_memory_for_a_trial_is_no_mark_against_a_version(machine: Machine) -> None:
    digest = machine.shop.add(MODEL, model(1))
    machine.oracle.failure[digest] = OutOfMemory("It", 2, 1)
    outcome = await machine.pull(MODEL)
    assert outcome.update is not None
    assert outcome.update.cause == "failed"
    with pytest.raises(NotFound):
        machine.serves(MODEL)
    machine.oracle.failure.clear()
    assert (await machine.pull(MODEL)).update is not None
    assert machine.serves(MODEL) == model(1)


async def test_a_broken_link_or_a_full_disk_keeps_the_state_for_the_next_pull(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    for failure in (SourceError("the link broke"), DiskFull("/", 2, 1)):
        machine.shop.failure = failure
        outcome = await machine.pull()
        assert outcome.update is not None
        assert (outcome.update.state, outcome.error) == ("downloading", str(failure))
        machine.restart()
    machine.shop.failure = None
    await machine.pull()
    assert len(machine.updater.ledger.all()) == 1, "it was one update all the time"
    assert machine.serves() == b"one"


@pytest.mark.parametrize("state", list(TIMEOUTS))
async def test_no_state_lasts_longer_than_its_time_out(machine: Machine, state: str) -> None:
    await at_state(machine, state)
    machine.now += TIMEOUTS[state] + 1  # type: ignore[index]
    machine.restart()
    machine.shop.goods["policies/other"] = machine.shop.goods[MODEL]
    await machine.updater.pull([])
    update = machine.updater.ledger.latest()[MODEL]
    assert (update.state, update.cause) == ("rolled_back", "timed_out")
    assert machine.serves(MODEL) == model(1)
    machine.waits = ""
    machine.oracle.hangs.clear()
    assert (await machine.pull(MODEL)).error == "", "it may be tried again"
    assert machine.serves(MODEL) == model(2)


@pytest.mark.parametrize("state", list(TIMEOUTS))
async def test_every_state_can_be_cancelled(machine: Machine, state: str) -> None:
    await at_state(machine, state)
    ended = await machine.updater.cancel(MODEL)
    assert (ended.state, ended.cause) == ("rolled_back", "cancelled")
    assert machine.serves(MODEL) == model(1)
    with pytest.raises(FleetError, match="No update of models/house is under way"):
        await machine.updater.cancel(MODEL)


async def test_a_running_download_hears_of_its_cancelling(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    machine.shop.hang = True
    pull = asyncio.ensure_future(machine.pull())
    await asyncio.sleep(0.05)
    with pytest.raises(FleetError, match="Another process"):
        await machine.started().pull([])
    ended = await machine.started().cancel(SLOT)
    assert ended.cause == "cancelled"
    assert (await pull).update == ended


async def test_an_interrupted_pull_goes_on(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    machine.shop.hang = True
    pull = asyncio.ensure_future(machine.pull())
    await asyncio.sleep(0.05)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    machine.restart()
    machine.shop.hang = False
    await machine.pull()
    assert [update.state for update in machine.updater.ledger.all()] == ["confirmed"]


async def test_another_version_takes_the_place_of_one_under_way(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    machine.shop.failure = SourceError("broken")
    await machine.pull()
    machine.shop.failure = None
    machine.shop.add(SLOT, b"two")
    await machine.pull()
    causes = [(update.state, update.cause) for update in machine.updater.ledger.all()]
    assert causes == [("rolled_back", "superseded"), ("confirmed", "")]


async def test_expired_metadata_stops_updates_and_never_serving(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    await machine.pull()

    async def expired(_target: str) -> Any:
        raise MetadataExpired("The fleet's timestamp metadata has expired.")

    machine.shop.find = expired  # type: ignore[method-assign,assignment]
    assert "has expired" in (await machine.pull()).error
    assert machine.serves() == b"one"


async def test_an_update_waits_where_the_machine_may_not_now(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    machine.waits = "It waits for power."
    outcome = await machine.pull()
    assert outcome.update is not None
    assert (outcome.waiting, outcome.update.state) == ("It waits for power.", "offered")


async def test_an_adapter_is_refused_on_another_base(machine: Machine, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf", "llama")
    lora = write_made(tmp_path / "lora.gguf", tiny, 1).read_bytes()
    machine.shop.add("adapters/it", b"lora")
    outcome = await machine.pull("adapters/it")
    assert "made for the model with sha256 bbbb" in outcome.error
    assert machine.shop.brought == 0, "not a byte is fetched"
    base = machine.shop.add(MODEL, tiny.read_bytes())
    machine.shop.add("adapters/none", b"GGUF no adapter", base=base)
    machine.shop.add("adapters/it", lora, base=base)
    outcomes = await machine.updater.pull(
        [Assignment(slot=name, target=name) for name in ("adapters/it", MODEL)]
    )
    assert [outcome.assignment.slot for outcome in outcomes] == [MODEL, "adapters/it"], "the base comes first"
    assert machine.serves("adapters/it") == lora
    outcome = await machine.pull("adapters/none")
    assert outcome.update is not None and outcome.update.cause == "refused"
    assert "not tried again" in (await machine.pull("adapters/none")).error


async def test_what_a_slot_may_not_have(machine: Machine) -> None:
    machine.shop.add(SLOT, b"one")
    for slot in (MODEL, "policies/../x", "policies/", "house"):
        assert "cannot be" in (await machine.pull(slot, SLOT)).error
    assert "should have" in (await machine.pull(sha256="0" * 64)).error
    assert "no policies/none" in (await machine.pull("policies/none")).error
    machine.shop.add(MODEL, b"GGUF no model")
    outcome = await machine.pull(MODEL)
    assert outcome.update is not None
    assert outcome.update.cause == "refused"
    assert "not tried again" in (await machine.pull(MODEL)).error


def test_states_follow_each_other_and_nothing_else(machine: Machine) -> None:
    update = asyncio.run(_begun(machine))
    for state in STATES:
        for after in STATES:
            now = type(update)(**{f: getattr(update, f) for f in update.__struct_fields__} | {"state": state})
            cause: Any = "cancelled" if after == "rolled_back" else ""
            if not now.ended and (after == NEXT[state] or after == "rolled_back"):
                assert advanced(now, after, 5.0, cause=cause).state == after
            else:
                with pytest.raises(FleetError):
                    advanced(now, after, 5.0, cause=cause)
    with pytest.raises(FleetError):
        advanced(update, "rolled_back", 5.0)


async def _begun(machine: Machine) -> Any:
    machine.shop.add(SLOT, b"one")
    machine.waits = "wait"
    return (await machine.pull()).update


async def at_state(machine: Machine, state: str) -> None:
    """A machine that serves model 1, and whose update to model 2 has come to a state and stays there."""
    machine.shop.add(MODEL, model(1))
    await machine.pull(MODEL)
    digest = machine.shop.add(MODEL, model(2))
    machine.updater._permit = lambda update: "wait" if update.state == state else ""
    if state == "active":
        machine.updater._permit = lambda _update: ""
        machine.oracle.hangs.add(digest)
        pull = asyncio.ensure_future(machine.pull(MODEL))
        while machine.updater.ledger.latest()[MODEL].state != "active":
            await asyncio.sleep(0.01)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
    else:
        await machine.pull(MODEL)
    assert machine.updater.ledger.latest()[MODEL].state == state
