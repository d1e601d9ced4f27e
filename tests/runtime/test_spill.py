"""The prefix cache as a store of files: found by tokens, checked, bounded, and never in the way."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.runtime import spill
from lichen.runtime.spill import CacheKey, SpillStore

KEY = CacheKey(
    model_sha256="a" * 64,
    adapter_sha256="",
    adapter_scale=0.0,
    template_sha256="b" * 64,
    kv_type="f16",
    library_version="1",
    context_layout="streams",
)
TOKENS = list(range(100))
PAYLOAD = bytes(range(256)) * 16


def opened(folder: Path, *, limit: int = 1 << 30, key: CacheKey = KEY) -> SpillStore:
    store = SpillStore(folder, limit, key)
    assert store.wait_ready(10)
    return store


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def the_file(folder: Path) -> Path:
    (path,) = files(folder)
    return path


def read(store: SpillStore, tokens: list[int]) -> bytes | None:
    found = store.match(tokens)
    payload = None if found is None else store.read(found[1])
    return None if payload is None else bytes(payload)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    assert opened(tmp_path).write(TOKENS, PAYLOAD)
    store = opened(tmp_path)
    found = store.match([*TOKENS[:60], 7, 8])
    assert found is not None
    assert found[0] == 60
    assert read(store, TOKENS) == PAYLOAD
    assert store.tokens(found[1]) == TOKENS
    assert store.match([7]) is None
    assert store.match([]) is None


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    opened(tmp_path / "cache").write(TOKENS, PAYLOAD)
    path = the_file(tmp_path)
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent, path.parent.parent)] == [
        0o600,
        0o700,
        0o700,
    ]


prompts = st.lists(st.integers(0, 2), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(prompts, max_size=8), st.lists(prompts, min_size=1, max_size=8))
def test_a_match_is_what_a_linear_search_finds(written: list[list[int]], asked: list[list[int]]) -> None:
    def common(one: list[int], other: list[int]) -> int:
        return next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )

    with tempfile.TemporaryDirectory() as folder:
        store = opened(Path(folder))
        for tokens in written:
            store.write(tokens, bytes(tokens) or b"x")
        for again in (store, opened(Path(folder))):
            for tokens in asked:
                expected = max((common(tokens, known) for known in written), default=0)
                found = again.match(tokens)
                assert (found[0] if found else 0) == expected
                if found:
                    payload = again.read(found[1])
                    assert payload is not None
                    assert list(payload[:expected]) == tokens[:expected]


def test_an_entry_that_covers_the_tokens_is_enough_and_a_longer_one_replaces_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.write(TOKENS, PAYLOAD)
    assert not store.write(TOKENS[:50], PAYLOAD)
    assert not store.write(TOKENS, PAYLOAD)
    assert store.write([*TOKENS[:50], 7], PAYLOAD), "another branch"
    assert store.write([*TOKENS, 1, 2], b"longer")
    assert len(files(tmp_path)) == 2
    assert read(store, TOKENS) == b"longer"


def at_every_region() -> list[Any]:
    """Damage to a file of these TOKENS and PAYLOAD, with the part that it hits."""
    fixed, packed = spill._FIXED.size, 4 * len(TOKENS)
    flips = {
        "magic": 0,
        "version": 8,
        "count": 12,
        "length": 16,
        "key": 24,
        "payload digest": 60,
        "first token": fixed,
        "last token": fixed + packed - 1,
        "header digest": fixed + packed + 3,
        "payload": fixed + packed + spill.DIGEST + 100,
        "last byte": fixed + packed + spill.DIGEST + len(PAYLOAD) - 1,
    }
    cases = [pytest.param(("flip", at), id=name) for name, at in flips.items()]
    cuts = (0, 1, 8, fixed - 1, fixed, fixed + packed - 4, fixed + packed + spill.DIGEST, -1)
    cases += [pytest.param(("cut", at), id=f"cut at {at}") for at in cuts]
    return [*cases, pytest.param(("append", 0), id="longer"), pytest.param(("noise", 0), id="noise")]


def damage(content: bytes, kind: str, at: int) -> bytes:
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    return content + b"\0" if kind == "append" else os.urandom(len(content))


@pytest.mark.parametrize("fault", at_every_region())
@pytest.mark.parametrize("known", [True, False], ids=["while known", "before the start"])
def test_damage_anywhere_costs_one_line_and_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: tuple[str, int], known: bool
) -> None:
    store = opened(tmp_path)
    store.write(TOKENS, PAYLOAD)
    path = the_file(tmp_path)
    path.write_bytes(damage(path.read_bytes(), *fault))
    with caplog.at_level(logging.WARNING, "lichen.spill"):
        if not known:
            store = opened(tmp_path)
        assert read(store, TOKENS) is None
        assert read(store, TOKENS) is None
    assert len(caplog.records) == 1
    assert "was removed: it " in caplog.text
    assert files(tmp_path) == []
    assert store.write(TOKENS, PAYLOAD), "it is computed and kept again"
    assert read(store, TOKENS) == PAYLOAD


def test_entries_of_another_key_are_not_seen_and_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tmp_path).write(TOKENS, PAYLOAD)
    for field, value in (("model_sha256", "c"), ("adapter_scale", 0.5), ("context_layout", "unified")):
        assert opened(tmp_path, key=msgspec.structs.replace(KEY, **{field: value})).match(TOKENS) is None
    foreign = opened(tmp_path, key=msgspec.structs.replace(KEY, library_version="2"))
    foreign.write(TOKENS, b"foreign cells")
    ours, theirs = sorted(files(tmp_path), key=lambda path: -path.stat().st_size)
    ours.write_bytes(theirs.read_bytes())
    assert opened(tmp_path).match(TOKENS) is None
    assert "belongs to another model" in caplog.text
    assert read(foreign, TOKENS) == b"foreign cells"


def test_a_swapped_file_of_the_same_model_is_not_taken(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([1, 2, 3], b"one")
    one = the_file(tmp_path)
    store.write([4, 5, 6], b"two")
    two = next(path for path in files(tmp_path) if path != one)
    one.write_bytes(two.read_bytes())
    assert read(store, [1, 2, 3]) is None


def test_the_least_recently_used_go_first_whatever_their_key(tmp_path: Path) -> None:
    other = opened(tmp_path, key=msgspec.structs.replace(KEY, model_sha256="c"))
    other.write(TOKENS, PAYLOAD)
    size = the_file(tmp_path).stat().st_size
    store = opened(tmp_path, limit=3 * size + 100)
    first, second, third = ([n, *TOKENS[1:]] for n in (201, 202, 203))
    store.write(first, PAYLOAD)
    store.write(second, PAYLOAD)
    assert read(store, first) == PAYLOAD  # so the second is older now
    store.write(third, PAYLOAD)
    assert other.read(1) is None, "the other model's was the oldest"
    store.write([204, *TOKENS[1:]], PAYLOAD)
    assert store.match(second) is None
    assert read(store, first) == PAYLOAD
    assert read(store, third) == PAYLOAD
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * size + 100


def test_what_is_larger_than_the_limit_or_too_long_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, limit=1000)
    assert not store.write(TOKENS, PAYLOAD)
    monkeypatch.setattr(spill, "MAX_TOKENS", 50)
    assert not store.write(TOKENS, b"x")
    assert not store.write([], b"x")
    assert not store.write([1], b"")
    assert files(tmp_path) == []


def test_a_full_disk_is_one_warning_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)

    class Full:
        def __init__(self, handle: int, mode: str) -> None:
            self.handle = handle

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.handle)

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lichen.runtime.spill.os.fdopen", Full)
        assert not store.write(TOKENS, PAYLOAD)
        assert not store.write(TOKENS, PAYLOAD)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert files(tmp_path) == []
    monkeypatch.setattr(spill, "KEEP_FREE", 1 << 62)
    assert not store.write(TOKENS, PAYLOAD), "the last of a disk is left to others"
    monkeypatch.setattr(spill, "KEEP_FREE", 0)
    assert store.write(TOKENS, PAYLOAD)


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    store = opened(tmp_path / "cache")
    assert not store.write(TOKENS, PAYLOAD)
    assert store.match(TOKENS) is None
    assert len(caplog.records) == 1


def test_what_vanishes_is_forgotten(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(TOKENS, PAYLOAD)
    the_file(tmp_path).unlink()
    assert store.write(TOKENS[:50], PAYLOAD), "nothing covers it any more"
    the_file(tmp_path).unlink()
    assert read(store, TOKENS) is None
    assert store.match(TOKENS) is None


def test_clear_removes_what_is_there(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(TOKENS, PAYLOAD)
    store.write([5, 6], PAYLOAD)
    store.clear()
    assert files(tmp_path) == []
    assert store.match(TOKENS) is None


def test_half_written_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    opened(tmp_path).write(TOKENS, PAYLOAD)
    folder = the_file(tmp_path).parent
    old, new = folder / "old.tmp", folder / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    opened(tmp_path)
    assert not old.exists()
    assert new.exists()


WRITER = """
import sys
from pathlib import Path
from tests.runtime.test_spill import PAYLOAD, opened, read
store = opened(Path(sys.argv[1]), limit=60_000)
for n in range(200):
    tokens = [n % 17, *range(n % 50)]
    store.write(tokens, PAYLOAD + bytes([n % 17]))
    payload = read(store, tokens)
    assert payload is None or payload[-1] == n % 17, "another's cells"
"""


def test_two_processes_may_share_a_folder(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors
        assert "cannot be used" not in errors
        assert "was removed" not in errors
    store = opened(tmp_path, limit=60_000)
    assert all(path.suffix == ".kv" for path in files(tmp_path))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 60_000 + 5000
    for n in range(17):
        if found := store.match([n]):
            payload = store.read(found[1])
            assert payload is not None
            assert payload[-1] == n
