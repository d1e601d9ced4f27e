"""The collector over HTTP: who may read, what a body may cost, and what a browser is told."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
import pytest_asyncio

from lichen.errors import ConfigError, FleetError, NotFound, SourceError
from lichen.sync.collector.app import CollectorApp, Status, listening
from lichen.sync.collector.reading import read_census
from lichen.sync.reporting.reporter import http_post
from lichen.sync.reporting.wire import BODY_LIMIT, SIGNATURE
from lichen.sync.rollout import Policy
from tests.sync.reporting import SLOT, World, report
from tests.sync.rollouts import policy

READER = "r" * 43


class Served:
    """A collector that listens, and its world."""

    def __init__(self, world: World, url: str, client: httpx.AsyncClient) -> None:
        self.world, self.url, self.client = world, url, client


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    world = World()

    async def policies(slot: str) -> Policy | None:
        return policy(100) if slot == SLOT else None

    app = CollectorApp(world.desk, reader=READER, policies=policies, clock=lambda: world.now)
    async with listening(app, "127.0.0.1", 0) as url, httpx.AsyncClient(base_url=url) as client:
        yield Served(world, url, client)


async def test_a_device_reports_and_a_person_reads(served: Served) -> None:
    reporter = served.world.reporter()
    reporter.put(report(quality=0.75))
    assert await reporter.flush(http_post(served.client, served.url)) == 1
    census = await read_census(served.client, served.url, READER, SLOT)
    assert census is not None
    assert [each.device for each in census.reported] == [reporter.id]
    answer = await served.client.get("/v1/status", headers={"Authorization": f"Bearer {READER}"})
    status = msgspec.json.decode(answer.content, type=Status)
    assert (status.devices["member"], status.boards[0].versions) == (1, {"adapters/support-2": 1})
    page = await served.client.get("/", auth=("me", READER))
    assert page.status_code == 200
    assert "<td>100%</td>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "script" not in page.text


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer wrong",
        f"Basic {READER}",
        "Basic !!",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic " + base64.b64encode(b"me:wrong").decode(),
        f"Digest {READER}",
        f"Bearer  {READER}",
    ],
)
async def test_nobody_reads_without_the_token(served: Served, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/", "/v1/status", f"/v1/census?slot={SLOT}"):
        answer = await served.client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
        assert READER not in answer.text
    assert (await served.client.get("/health")).json() == {"status": "ok"}


async def test_what_is_refused_is_said_in_one_sentence(served: Served) -> None:
    """Bodies that are too large, packed, or no JSON; methods and paths that are not there."""
    answer = await served.client.post("/v1/reports", content=b" " * (BODY_LIMIT + 1))
    assert answer.status_code == 413
    answer = await served.client.post("/v1/reports", content=b"{}", headers={"Content-Encoding": "gzip"})
    assert "must not be packed" in answer.json()["error"]["message"]
    answer = await served.client.post("/v1/devices", content=b"{}", headers={SIGNATURE: "x"})
    assert (answer.status_code, "malformed" in answer.text) == (400, True)
    assert (await served.client.get("/v1/reports")).status_code == 405
    assert (await served.client.get("/nowhere")).json()["error"]["code"] == "http_error"


async def test_a_body_that_drips_is_cut(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lichen.sync.collector.app.BODY_S", 0.2)
    host, _, port = served.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/reports HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert b"504" in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_a_publisher_meets_collectors_that_are_wrong(served: Served) -> None:
    with pytest.raises(FleetError, match="does not take this token"):
        await read_census(served.client, served.url, "wrong", SLOT)
    assert await read_census(served.client, served.url, READER, "models/none") is None
    with pytest.raises(SourceError, match="cannot be reached"):
        await read_census(served.client, "http://127.0.0.1:1", READER, SLOT)
    with pytest.raises(SourceError, match="malformed"):
        liar = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200, text="[]")))
        await read_census(liar, "http://c.example", READER, SLOT)


async def test_two_collectors_cannot_have_one_address(served: Served) -> None:
    async def none(_slot: str) -> Policy | None:
        raise NotFound("none")

    app = CollectorApp(World().desk, reader=READER, policies=none)
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot listen on"):
        async with listening(app, "127.0.0.1", port):
            pass
