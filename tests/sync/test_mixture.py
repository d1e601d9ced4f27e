"""Mixtures of data: shares by weight, the same lines everywhere, and documents and sources that lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lichen.errors import HashMismatch, LichenError, ManifestError, SourceError
from lichen.sync.mixture import LINE_LIMIT, materialize, read_mixture, shares


def source(path: Path, lines: list[str], weight: float = 1.0) -> dict[str, Any]:
    """A file of lines, and what a document says of it."""
    path.write_text("".join(f"{line}\n" for line in lines))
    data = path.read_bytes()
    return {
        "url": path.as_uri(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "weight": weight,
        "licence": "MIT",
    }


def document(*sources: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"sources": sources, **more}).encode()


def lines(name: str, count: int) -> list[str]:
    return [json.dumps({"prompt": f"{name} {number}"}) for number in range(count)]


async def made(tmp_path: Path, data: bytes) -> list[str]:
    target = tmp_path / "out.jsonl"
    count = await materialize(read_mixture(data), tmp_path / "cache", target)
    found = target.read_text().splitlines()
    assert len(found) == count
    return [json.loads(line)["prompt"] for line in found]


async def test_lines_come_by_weight_and_are_the_same_each_time(tmp_path: Path) -> None:
    many, few = source(tmp_path / "many", lines("many", 100), 3.0), source(tmp_path / "few", lines("few", 4))
    first = await made(tmp_path, document(many, few, lines=40))
    assert sum(line.startswith("many") for line in first) == 30
    assert len({line for line in first if line.startswith("many")}) == 30, "no line twice without need"
    assert {first.count(line) for line in first if line.startswith("few")} == {2, 3}, "others in turn"
    assert await made(tmp_path, document(many, few, lines=40)) == first
    assert await made(tmp_path, document(many, few, lines=40, seed=1)) != first
    assert sorted(await made(tmp_path, document(many, few))) == sorted(
        [f"many {number}" for number in range(100)] + [f"few {number}" for number in range(4)]
    )


def test_shares_add_up(tmp_path: Path) -> None:
    three = [source(tmp_path / str(n), ["{}"], weight) for n, weight in enumerate((1.0, 1.0, 1.0))]
    assert shares(read_mixture(document(*three, lines=10)), [1, 1, 1]) == [4, 3, 3]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 5000,
        b"\xff",
        b'{"sources": []}',
        b'{"sources": [{"url": "https://x", "sha256": "no", "size": 1, "licence": "MIT"}]}',
        document({"url": "ftp://x/y", "sha256": "a" * 64, "size": 1, "licence": "MIT"}),
        document({"url": "https://x", "sha256": "a" * 64, "size": 1, "licence": "MIT", "weight": 0}),
        document({"url": "https://x", "sha256": "a" * 64, "size": 1, "licence": "MIT"}, lines=1 << 40),
        b" " * ((1 << 20) + 1),
    ],
)
def test_a_bad_document_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        read_mixture(data)


async def test_sources_that_lie_leave_nothing(tmp_path: Path) -> None:
    good = source(tmp_path / "good", lines("good", 2))
    cases: list[tuple[dict[str, Any], type[LichenError]]] = [
        (good | {"sha256": "0" * 64}, HashMismatch),
        (good | {"size": 5}, HashMismatch),
        (good | {"url": (tmp_path / "none").as_uri()}, SourceError),
        (source(tmp_path / "text", ["no json"]), ManifestError),
        (source(tmp_path / "long", ["1" * (LINE_LIMIT + 1)]), ManifestError),
        (source(tmp_path / "empty", ["", " "]), ManifestError),
    ]
    for bad, error in cases:
        with pytest.raises(error):
            await made(tmp_path, document(bad, lines=3))
        assert not (tmp_path / "out.jsonl").exists()
