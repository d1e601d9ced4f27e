"""`lichen fleet rollout` as a publisher types it, with a collector and devices that report to it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from lichen.cli import app
from lichen.cli.rollouts import seconds
from lichen.errors import ConfigError, LichenError
from lichen.sync.reporting.key import DeviceKey
from lichen.sync.reporting.outbox import Outbox
from lichen.sync.reporting.reporter import Reporter, http_post
from lichen.sync.trust.enrolment import read_enrolment
from lichen.sync.updates.states import Cause, State
from tests.sync.reporting import report

PASSPHRASE = {"LICHEN_FLEET_PASSPHRASE": "correct horse"}


@contextmanager
def collecting(data: Path, bundle: Path, *words: str) -> Iterator[str]:
    """A collector in a process of its own; its URL."""
    command = [sys.executable, "-m", "lichen.cli", "fleet", "collect", str(data), "--bundle", str(bundle)]
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Listening on "), line
    try:
        yield line.split()[2].rstrip(";")
    finally:
        process.terminate()
        process.stdout.close()
        assert process.wait(20) == 0


def telling(bundle: Path, url: str, sha256: str, *states: State) -> list[str]:
    """One new device for each state reports it of version 2; their ids."""
    enrolment = read_enrolment(bundle.read_bytes())

    async def tell() -> list[str]:
        ids = []
        async with httpx.AsyncClient() as client:
            for state in states:
                reporter = Reporter(DeviceKey.generate(), Outbox(":memory:"), enrolment)
                cause: Cause = "unhealthy" if state == "rolled_back" else ""
                reporter.put(report(sha256=sha256, state=state, cause=cause, quality=1.0))
                await reporter.flush(http_post(client, url))
                reporter.close()
                ids.append(reporter.id)
        return ids

    return asyncio.run(tell())


class Typing:
    """Somebody who types `lichen fleet` commands, in this process."""

    def __init__(self, home: Path) -> None:
        self.environment = {**PASSPHRASE, "LICHEN_HOME": str(home)}

    def run(self, *words: str) -> str:
        """What a command prints."""
        done = CliRunner().invoke(app, ["fleet", *words], env=self.environment, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    def complaint(self, *words: str) -> str:
        """What a command refuses with."""
        with pytest.raises(LichenError) as caught:
            self.run(*words)
        return str(caught.value)


def test_a_rollout_from_its_first_wave_to_its_rollback(tmp_path: Path) -> None:
    """Publish twice, roll out, report, advance, fail, and be rolled back by `watch`."""
    repository, data = tmp_path / "fleet", tmp_path / "collector"
    person = Typing(tmp_path / "home")
    run, complaint, environment = person.run, person.complaint, person.environment
    folder = str(repository)
    init = ("init", folder, "--mirror", repository.as_uri(), "--name", "moss")
    assert "cannot be a collector" in complaint(*init, "--collector", "http://c.example/")
    made = run(*init, "--collector", "http://127.0.0.1:1/", "--json")
    bundle = Path(json.loads(made)["bundle"])
    for version in ("1", "2"):
        file = tmp_path / f"support-{version}"
        file.write_bytes(f"lora {version}".encode())
        words = ("--kind", "adapters", "--licence", "MIT", "--base", "b" * 64, "--json")
        published = json.loads(run("publish", folder, str(file), *words))
    second = published["sha256"]
    begin = ("rollout", folder, "support", "--kind", "adapters", "--version")
    assert "no target 'adapters/support-3'" in complaint(*begin, "3")
    assert "is no wave" in complaint(*begin, "2", "--waves", "many")
    started = run(
        *begin, "2", "--previous", "1", "--waves", "100%,100%", "--min-reports", "3", "--soak", "0s"
    )
    assert "running, 1 of 2 waves open" in started
    assert "19 times of 20" in started
    assert "under way" in complaint(*begin, "2")
    assert "running" not in run("pause", folder, "support", "--reason", "lunch")
    assert "paused" in run("status", folder)
    assert "running" in run("resume", folder, "support")

    with collecting(data, bundle) as url:
        text = bundle.read_text(encoding="utf-8")
        bundle.write_text(text.replace("http://127.0.0.1:1/", url), encoding="utf-8")
        assert "needs a token" in complaint("rollout", folder, "support", "--advance")
        environment["LICHEN_FLEET_READER"] = (data / "reader.token").read_text(encoding="ascii").strip()
        assert "0 of 3 reports" in run("rollout", folder, "support", "--advance")
        good = telling(bundle, url, second, "confirmed", "confirmed", "confirmed")
        assert "Open the next wave" in run("watch", folder, "--once")
        opened = json.loads(run("rollout", folder, "support", "--advance", "--json"))
        assert (opened["policy"]["opened"], opened["verdict"]["action"]) == (2, "open")
        telling(bundle, url, second, "rolled_back")
        assert "1 of 4 devices rolled back" in run("watch", folder, "support", "--once")
        shown = run("status", folder, "support")
        for part in (
            "adapters/support: rolled back",
            "3 confirmed, 1 rolled back",
            "unhealthy",
            "Quality: 1.000",
        ):
            assert part in shown, shown
        (board,) = json.loads(run("status", folder, "--json"))
        assert (board["devices"], board["versions"]) == (4, {"adapters/support-2": 3})
        page = httpx.get(url, auth=("anybody", environment["LICHEN_FLEET_READER"]))
        assert page.status_code == 200
        assert "rolled back" in page.text
        assert "adapters/support-2" in page.text
        run("members", str(data), "--expel", good[0])
        assert json.loads(run("status", folder, "--json"))[0]["devices"] == 3
    assert "running" in run(*begin, "2", "--previous", "1"), "the same version may be tried again"
    assert "rolled back" in run("rollback", folder, "support")


def test_a_collector_keeps_its_tokens_from_the_network(tmp_path: Path) -> None:
    person, bundle = Typing(tmp_path / "home"), str(tmp_path / "fleet" / "enrolment.json")
    init = ("init", str(tmp_path / "fleet"), "--mirror", "https://m.example", "--root-keys", "1")
    person.run(*init, "--threshold", "1", "--collector", "https://c.example")
    words = ("collect", str(tmp_path / "data"), "--bundle", bundle, "--listen")
    assert "could be read by its whole network" in person.complaint(*words, "0.0.0.0:0")
    assert "is no address" in person.complaint(*words, "8643")
    assert not (tmp_path / "data").exists()
    Path(bundle).write_text("{}", encoding="utf-8")
    assert "malformed" in person.complaint(*words, "127.0.0.1:0")


def test_times_as_people_write_them() -> None:
    assert [seconds(text) for text in ("90", "30s", "5m", "1.5h", "2d")] == [90, 30, 300, 5400, 172_800]
    for bad in ("", "soon", "-1s", "1w", "1e9", "nan", "9" * 99):
        with pytest.raises(ConfigError, match="is no time"):
            seconds(bad)
