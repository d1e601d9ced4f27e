"""The conformance client as TUF's suite drives it: its command line, a real server, the metadata it shows."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from tests.sync.hostile_repository import HostileRepository, new_key
from tests.sync.model_server import ModelServer

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """One client-under-test and the server that it asks."""

    def __init__(self, folder: Path, server: ModelServer) -> None:
        self.folder, self.server = folder, server
        self.repository = HostileRepository()
        for part in (self.repository.timestamp, self.repository.snapshot, *self.repository.roles.values()):
            part.expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
        self.repository.next_root(lambda root: setattr(root, "expires", later))
        self.repository.release()
        (folder / "root.json").write_bytes(self.repository.first_root)

    def run(self, *words: str) -> int:
        self.server.files = {f"/{name}": data for name, data in self.repository.files.items()}
        self.server.requests.clear()
        command = [sys.executable, "-m", "tests.conformance.tuf_client"]
        command += ["--metadata-dir", str(self.folder / "metadata"), *words]
        return subprocess.run(command, cwd=ROOT, timeout=60, check=False, capture_output=True).returncode

    def init(self) -> int:
        return self.run("init", str(self.folder / "root.json"))

    def refresh(self) -> int:
        return self.run("--metadata-url", f"{self.server.url}/metadata", "refresh")

    def download(self, target: str) -> int:
        return self.run(
            *("--metadata-url", f"{self.server.url}/metadata", "--target-name", target),
            *("--target-base-url", f"{self.server.url}/targets", "--target-dir", str(self.folder / "got")),
            "download",
        )

    def versions(self) -> dict[str, int]:
        files = (self.folder / "metadata").glob("*.json")
        return {path.stem: Metadata.from_file(str(path)).signed.version for path in files}

    def asked(self) -> list[str]:
        return [path for path, _ in self.server.requests]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    server = ModelServer()
    yield Client(tmp_path, server)
    server.close()


def test_init_refresh_and_download_as_the_suite_asks_for_them(client: Client) -> None:
    repository = client.repository
    assert client.init() == 0
    assert client.asked() == []
    assert client.versions() == {"root": 1}
    assert client.refresh() == 0
    assert client.versions() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}
    assert client.asked() == [
        *("/metadata/2.root.json", "/metadata/3.root.json", "/metadata/timestamp.json"),
        *("/metadata/2.snapshot.json", "/metadata/2.targets.json"),
    ]
    assert client.refresh() == 0
    assert client.asked() == ["/metadata/3.root.json", "/metadata/timestamp.json"], "what is current is kept"

    repository.delegate("targets", "a role/of them", ["quoted/*"], [new_key()])
    repository.roles["a role/of them"].expires = repository.timestamp.expires
    target = repository.add("quoted/a file", b"bytes", role="a role/of them")
    repository.release()
    name = f"metadata/{repository.roles['a role/of them'].version}.a%20role%2Fof%20them.json"
    repository.files[name] = repository.files[name.replace("%20", " ").replace("%2F", "/")]
    repository.files["targets/" + target.get_prefixed_paths()[0].replace(" ", "%20")] = b"bytes"
    assert client.download("quoted/a file") == 0
    assert [path.read_bytes() for path in (client.folder / "got").iterdir()] == [b"bytes"]
    assert client.versions()["a%20role%2Fof%20them"] == 2
    assert client.download("quoted/a file") == 0
    assert not any("/targets/" in path for path in client.asked()), "it is here already"
    assert client.download("quoted/none") == 1


def test_what_verifies_before_a_failure_stays(client: Client) -> None:
    repository = client.repository
    assert client.init() == client.refresh() == 0
    repository.release()
    repository.files["metadata/3.targets.json"] = b"{}"
    assert client.refresh() == 1
    assert client.versions() == {"root": 2, "timestamp": 3, "snapshot": 3, "targets": 2}
    repository.timestamp.version = 1
    repository.sign_timestamp(bump=False)
    assert client.refresh() == 1
    assert client.versions()["timestamp"] == 3
