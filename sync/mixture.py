"""A mixture of data to train on: a document of sources, weights and hashes, and how it becomes lines.

    {"sources": [{"url": "https://…/faq.jsonl", "sha256": "…", "size": 1024, "weight": 2.0,
                  "licence": "MIT"}, …], "lines": 10000, "seed": 0}

Each source is a file of JSON lines. A mixture of n lines takes from each source a share by its weight (by
largest remainders, so that the shares add up to n); of a source that is too short, lines come again. Which
lines come, and their order, is decided by sha256 over the seed and the place of the line: the same on every
machine. Nothing is believed of a source but that its bytes have the hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, Struct

from lichen.errors import HashMismatch, ManifestError, SourceError
from lichen.sync.download import hash_file
from lichen.sync.manifest import Sha256, Words

LIMIT = 1 << 20  # bytes of a document
LINE_LIMIT = 1 << 20  # bytes of a line of a source
MAX_LINES = 1_000_000  # they are sorted in memory, about 200 bytes each


class Source(Struct, frozen=True, kw_only=True):
    """A file of JSON lines. url: https: or file:. size in bytes. weight: its part beside the others'."""

    url: Annotated[str, Meta(min_length=1, max_length=2048)]
    sha256: Sha256
    size: Annotated[int, Meta(ge=1, le=1 << 40)]
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    licence: Words


class Mixture(Struct, frozen=True, kw_only=True):
    """A document. lines: how many to make, 0 for every line of every source once, whatever the weights."""

    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=256)]
    lines: Annotated[int, Meta(ge=0, le=MAX_LINES)] = 0
    seed: Annotated[int, Meta(ge=0, le=1 << 53)] = 0


def read_mixture(data: bytes) -> Mixture:
    """A mixture from its document. Raises ManifestError."""
    if len(data) > LIMIT:
        raise ManifestError(f"The mixture is larger than {LIMIT:,} bytes.")
    try:
        mixture = msgspec.json.decode(data, type=Mixture)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"The mixture is malformed: {error}.") from error
    for source in mixture.sources:
        if urlsplit(source.url).scheme not in ("https", "file"):
            raise ManifestError(f"{source.url[:200]!r} cannot be a source.", hint="Use https: or file:.")
    return mixture


async def materialize(mixture: Mixture, cache: Path, target: Path) -> int:
    """Write the mixture's lines to `target`, durable only when whole; how many there are.

    cache: a folder for the sources' files, by sha256. Raises SourceError, HashMismatch, ManifestError.
    """
    files = [await _bring(source, cache) for source in mixture.sources]
    return await asyncio.to_thread(_write, mixture, files, target)


def shares(mixture: Mixture, counts: Sequence[int]) -> list[int]:
    """How many lines each source gives, which has `counts` of them."""
    if not mixture.lines:
        return list(counts)
    total = sum(source.weight for source in mixture.sources)
    exact = [mixture.lines * source.weight / total for source in mixture.sources]
    whole = [int(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: (whole[index] - exact[index], index))
    for index in by_rest[: mixture.lines - sum(whole)]:
        whole[index] += 1
    return whole


async def _bring(source: Source, cache: Path) -> Path:
    from lichen.sync.download import download
    from lichen.sync.sources import Origin

    parts = urlsplit(source.url)
    if parts.scheme == "file":
        return await asyncio.to_thread(_local, source, Path(unquote(parts.path)))
    place, partial = cache / source.sha256, cache / f"{source.sha256}.part"
    if await asyncio.to_thread(place.is_file):
        return place
    await asyncio.to_thread(cache.mkdir, parents=True, exist_ok=True)
    origin = Origin(
        file_name=parts.path.rpartition("/")[2], url=source.url, sha256=source.sha256, size=source.size
    )
    await download(origin, partial, lambda _done, _of: None)
    partial.replace(place)
    return place


def _local(source: Source, path: Path) -> Path:
    try:
        same = path.stat().st_size == source.size and hash_file(path) == source.sha256
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    if not same:
        raise HashMismatch(f"{path} is not the file that the mixture names.")
    return path


def _write(mixture: Mixture, files: Sequence[Path], target: Path) -> int:
    places = [list(_lines(path)) for path in files]
    wanted = shares(mixture, [len(each) for each in places])
    drawn: list[tuple[bytes, int, tuple[int, int]]] = []
    for number, (each, count) in enumerate(zip(places, wanted, strict=True)):
        if count and not each:
            raise ManifestError(f"{mixture.sources[number].url} has no lines.")
        for round_number in range(-(-count // len(each)) if each else 0):
            keys = ((_key(mixture.seed, number, round_number, index), index) for index in range(len(each)))
            best = sorted(keys)[: count - round_number * len(each)]
            drawn += [(key, number, each[index]) for key, index in best]
    staged = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged.open("wb") as out:
        readers = [path.open("rb") for path in files]
        try:
            for _, number, (offset, length) in sorted(drawn):
                readers[number].seek(offset)
                out.write(readers[number].read(length) + b"\n")
        finally:
            for reader in readers:
                reader.close()
    staged.replace(target)
    return len(drawn)


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """Where each line of a file lies: offset and length without its end. Raises ManifestError."""
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), 1):
            if len(line) > LINE_LIMIT:
                raise ManifestError(f"Line {number} of {path.name} has more than {LINE_LIMIT:,} bytes.")
            bare = line.rstrip(b"\r\n")
            if bare.strip():
                try:
                    json.loads(bare)
                except (ValueError, RecursionError) as error:
                    raise ManifestError(f"Line {number} of {path.name} is not JSON.") from error
                yield at, len(bare)
            at += len(line)


def _key(seed: int, source: int, round_number: int, line: int) -> bytes:
    return hashlib.sha256(f"{seed}/{source}/{round_number}/{line}".encode()).digest()
