"""The key file and `lichen keys`: what is kept, what is refused, what survives."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.cli import app
from lichen.errors import ConfigError, NotFound
from lichen.runtime.http.keys import FILE_LIMIT, KeyStore

GOOD: dict[str, Any] = {
    "id": "key_0123456789ab",
    "name": "laptop",
    "created": "2026-01-02T03:04:05+00:00",
    "ending": "abcd",
    "sha256": "0" * 64,
    "revoked": False,
}


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "home" / "keys.json")


def test_a_key_works_until_it_is_revoked(store: KeyStore) -> None:
    assert (store.list(), store.any(), store.verify("x")) == ((), False, None)
    first, second = store.create("first"), store.create("second")
    assert first.startswith("lk-")
    assert len(first) == 46
    assert first != second
    for secret, name in ((first, "first"), (second, "second")):
        key = store.verify(secret)
        assert key is not None
        assert (key.name, key.ending, key.revoked) == (name, secret[-4:], False)
    for wrong in ("", "lk-", first[:-1], first + "x", first.upper(), "\udcff", "x" * 100_000):
        assert store.verify(wrong) is None
    assert store.revoke("first").revoked
    assert store.verify(first) is None
    assert store.verify(second) is not None
    again = store.create("first")  # a revoked key's name is free
    assert store.verify(again) is not None
    store.revoke(store.list()[-1].id)
    assert store.verify(again) is None
    with pytest.raises(NotFound, match="keys list"):
        store.revoke("first")


def test_the_file_holds_no_key_and_only_its_owner_reads_it(store: KeyStore) -> None:
    secret = store.create("laptop")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    content = store.path.read_text()
    assert secret not in content
    assert secret[3:20] not in content
    assert [path.name for path in store.path.parent.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("name", ["", " ", "a b", "../x", "-x", "a\nb", "x" * 65, "é"])
def test_a_name_that_cannot_be_one_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        store.create(name)
    assert not store.path.exists()


def test_a_name_that_is_taken_is_refused(store: KeyStore) -> None:
    store.create("laptop")
    with pytest.raises(ConfigError, match="already"):
        store.create("laptop")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"version": 2, "keys": []}',
        b'{"keys": []}',
        b'{"version": 1, "keys": {}, "more": 1}',
        b"[" * 100_000,
        b" " * (FILE_LIMIT + 1),
        json.dumps({"version": 1, "keys": [GOOD, GOOD]}).encode(),
        *(
            json.dumps({"version": 1, "keys": [{**GOOD, **fields}]}).encode()
            for fields in (
                {"id": "../../x"},
                {"name": "\x1b[2J"},
                {"created": "\x1b[2J-01-02T03"},
                {"ending": "abcde"},
                {"sha256": "0" * 63},
                {"sha256": "é" * 64},
                {"revoked": "no"},
                {"admin": True},
            )
        ),
    ],
)
def test_a_bad_file_is_one_clear_error_and_is_left_alone(store: KeyStore, content: bytes) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(content)
    store.path.chmod(0o600)
    for act in (store.list, store.any, lambda: store.verify("x"), lambda: store.create("a")):
        with pytest.raises(ConfigError, match=r"keys\.json"):
            act()
    assert store.path.read_bytes() == content


def test_a_file_that_others_can_change_or_that_is_none_is_refused(store: KeyStore) -> None:
    secret = store.create("laptop")
    store.path.chmod(0o620)
    with pytest.raises(ConfigError, match="chmod 600"):
        store.verify(secret)
    store.path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(store.path)
        with pytest.raises(ConfigError, match="not a file"):
            KeyStore(store.path).any()
        (store.path.rmdir if store.path.is_dir() else store.path.unlink)()


def test_a_home_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be used"):
        KeyStore(tmp_path / "home" / "keys.json").create("laptop")


def test_writers_at_the_same_time_lose_no_key(store: KeyStore) -> None:
    secrets: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: secrets.append(KeyStore(store.path).create(f"key{n}")))
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list()) == 16
    assert all(store.verify(secret) for secret in secrets)


def test_the_commands(tmp_path: Path) -> None:
    def lichen(*words: str) -> Any:
        return CliRunner().invoke(app, ["--home", str(tmp_path), "keys", *words])

    assert "lichen keys create" in lichen("list").stdout
    secret = lichen("create", "laptop").stdout.strip()
    assert KeyStore(tmp_path / "keys.json").verify(secret) is not None
    listed = json.loads(lichen("list", "--json").stdout)
    assert [(key["name"], key["ending"], key["revoked"]) for key in listed] == [
        ("laptop", secret[-4:], False)
    ]
    assert "sha256" not in listed[0]
    assert secret not in lichen("list").stdout
    assert "Revoked laptop" in lichen("revoke", "laptop").stdout
    assert "revoked" in lichen("list").stdout
    assert isinstance(lichen("revoke", "laptop").exception, NotFound)
    assert isinstance(lichen("create", "a b").exception, ConfigError)
