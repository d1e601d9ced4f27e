"""`lichen plan` and what follows from an intent, on a machine whose measurements are at hand."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import msgspec
import pytest

from lichen import Runtime
from lichen.config import load
from lichen.devices.fingerprint import Key
from lichen.devices.fingerprint_cache import FingerprintCache
from lichen.devices.hardware import class_here
from lichen.devices.probe import probe
from lichen.errors import ConfigError
from lichen.planning import Asked, given_settings, plan_for, wish_of
from lichen.runtime import native
from lichen.runtime.layouts import LayoutRecord, keep_record
from tests.cli.test_commands import complaint, lichen
from tests.devices.curves_at_hand import record

DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, lichen_home: Path, model_path: Path) -> Path:
    """A home in which the default model was measured in three layouts."""
    if model_path.name != DIGEST:
        pytest.skip("needs the default model in the tests' store")
    home = tmp_path_factory.mktemp("measured")
    (home / "store").symlink_to(lichen_home / "store")
    cache = FingerprintCache(home / "fingerprints")
    for layout in ("source", "q8_0", "f16"):
        key = Key(hardware=class_here(), model=DIGEST, layout=layout, library=native.version())
        cache.save(record(layout, key, probe().threads))
    return home


def test_a_plan_is_a_table_a_picture_and_reasons(measured: Path) -> None:
    done = lichen("plan", "smollm2-135m", "--intent", "throughput", "--users", "16", home=measured)
    assert done.returncode == 0, done.stderr
    assert "LAYOUT" in done.stdout and "TOK/S" in done.stdout
    assert "the pick" in done.stdout and "| " in done.stdout
    assert "For throughput with 16 users" in done.stdout
    assert "--slots 16" in done.stdout


def test_a_plan_as_json_follows_the_load(measured: Path) -> None:
    picks = {}
    for users in ("1", "16"):
        words = ("--intent", "throughput", "--users", users, "--prompt", "16", "--answer", "256", "--json")
        done = lichen("plan", "smollm2-135m", *words, home=measured)
        assert done.returncode == 0, done.stderr
        picks[users] = json.loads(done.stdout)
    assert picks["1"]["pick"]["plan"]["layout"] == "source"
    assert picks["16"]["pick"]["plan"]["layout"] == "f16"
    assert picks["16"]["settings"]["slots"] == 16
    assert picks["1"]["wanted_layout"] is None
    assert picks["16"]["pick"]["prediction"]["kl"] <= 0.01


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--ttft", "1us"), "is attainable, not 0.001 ms (--ttft)"),
        (("--memory", "10MB"), "MB are needed, more than 10 MB"),
        (("--ttft", "-5ms"), "--ttft must be a time such as 300ms or 2s"),
        (("--memory", "1" + "0" * 30 + "GB"), "--memory must be a size"),
        (("--users", "0"), "--users must lie between 1 and"),
        (("--quality", "nan"), "--quality must be a number"),
        (("--intent", "speed"), "There is no intent 'speed'"),
        (("--ttft", "10ms", "--itl", "20ms"), "is longer than --ttft"),
        (("--layouts", "q9_9"), "is no type that a model can be stored as"),
    ],
)
def test_what_cannot_be_is_one_sentence(measured: Path, words: tuple[str, ...], sentence: str) -> None:
    line = complaint(lichen("plan", "smollm2-135m", *words, home=measured))
    assert sentence in line


def test_objectives_without_an_intent_are_refused(tmp_path: Path) -> None:
    line = complaint(lichen("serve", "--objectives", "users=4", home=tmp_path))
    assert "no effect without an intent" in line
    line = complaint(lichen("serve", "--intent", "latency", "--objectives", "usres=4", home=tmp_path))
    assert "Did you mean users?" in line


def test_settings_that_were_given_stay(measured: Path, model_path: Path) -> None:
    flags = {"home": str(measured), "intent": "throughput", "objectives": "users=16", "slots": 3}
    effective = load(flags, {})
    asked = Asked(name="smollm2-135m", path=model_path, sha256=DIGEST)
    given = given_settings(effective)
    assert given == {"slots": 3}
    planned = plan_for(effective.config, asked, wish_of(effective.config), given=given)
    assert planned.config.slots == 3
    assert planned.config.threads >= 1, "a plan names the threads"
    assert any("You chose yourself, and it stays: slots 3." in reason for reason in planned.reasons)
    assert planned.path == model_path, "the layout it wants is not here"


def test_a_layout_that_was_measured_as_bad_is_not_wanted(measured: Path, model_path: Path) -> None:
    effective = load({"home": str(measured), "intent": "throughput", "objectives": "users=16"}, {})
    asked = Asked(name="smollm2-135m", path=model_path, sha256=DIGEST)
    wanted = wish_of(effective.config)
    before = plan_for(effective.config, asked, wanted, given={})
    assert before.wanted == "f16"
    bad = LayoutRecord(model=DIGEST, layout="f16", sha256="0" * 64, kl=0.4, positions=100)
    keep_record(measured, bad)
    path = measured / "layouts" / f"{DIGEST[:16]}-f16.json"
    try:
        assert plan_for(effective.config, asked, wanted, given={}).wanted == "q8_0"
        path.write_text("{damaged")
        assert plan_for(effective.config, asked, wanted, given={}).wanted == "f16"
        assert not path.exists(), "a record that cannot be read is removed"
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(bad, kl=-1.0)))
        assert plan_for(effective.config, asked, wanted, given={}).wanted == "f16"
    finally:
        path.unlink(missing_ok=True)


async def test_a_runtime_with_an_intent_runs_its_plan(measured: Path) -> None:
    async with Runtime(
        "smollm2-135m", home=measured, intent="latency", objectives="prompt=16", context=512
    ) as runtime:
        assert runtime.plan is not None
        plan = runtime.plan.choice.pick.plan
        assert plan.layout == "source"
        assert runtime.served.options.slots == plan.slots
        assert runtime.served.info.context == 512
        done = await asyncio.wait_for(runtime.complete("1, 2, 3,", max_tokens=3, temperature=0), 60)
        assert done.text.startswith(" 4")


def test_a_runtime_with_objectives_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="intent"):
        Runtime(objectives="users=4")
    assert "LICHEN_INTENT" not in os.environ
