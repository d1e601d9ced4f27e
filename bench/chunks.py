"""`python -m bench.chunks`: what a new model and its next versions cost in bytes, and how fast they go out and in.

Beside lichen, with and without differences to the older version: chunks as casync makes them (content-defined, 64 KiB
on average, no tensor boundaries, each compressed with zstd) and the whole file under zstd. Bytes of lichen are
those that mirrors delivered, recipe included. Speed and memory are of processes of their own, on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from bench import versions
from bench.certificate import certificate, close_certificate, model_file, save
from bench.peer import ROOT
from bench.table import Rows, aligned, number
from lichen.errors import LichenError
from lichen.quant.gguf_check import tensor_places
from lichen.sync.chunks import fetch, find_recipe, publish_file
from lichen.sync.mirrors import FsspecMirror
from lichen.sync.recipe import Recipe
from lichen.sync.store import Store
from lichen.sync.stored import divide

SHARE = 0.03  # of the tensors that change
SEEDS = 3
LEVEL = 3  # of the peers' zstd


class _Counted(FsspecMirror):
    """A folder as a mirror that counts what it gives out."""

    received = 0

    async def read(self, path: str, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        async for part in super().read(path, start, stop):
            self.received += len(part)
            yield part


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and one JSON line, write the result."""
    flags = argparse.ArgumentParser(prog="python -m bench.chunks", description="bytes and speed of updates")
    flags.add_argument("--model", default="smollm2-135m", help="a GGUF file, or a model of lichen's store")
    flags.add_argument("--only", choices=("cases", "speed"), help="one half of it")
    flags.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # a worker process of the speed part
    options = flags.parse_args(arguments)
    if options.work:
        print(json.dumps(_work(*options.work)))
        return 0
    try:
        model = model_file(options.model)
        record: dict[str, Any] = {"kind": "chunks", "status": "ok", "birth": certificate(model)}
        with tempfile.TemporaryDirectory() as folder:
            record["cases"] = _cases(model, Path(folder)) if options.only != "speed" else []
            record["speed"] = _speed(Path(folder)) if options.only != "cases" else {}
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    close_certificate(record["birth"])
    path = save(record)
    print(aligned(rows(record), left=1))
    print(json.dumps({"bench": "chunks", "result": path.name, "speed": record["speed"]}))
    return 0


def rows(record: dict[str, Any]) -> Rows:
    """Header and a row for each case: bytes as per cents of the new file."""
    table: Rows = [
        ["case", "MB", "lichen %", "without differences %", "64 KiB, no tensors %", "zstd whole %"]
    ]
    for case in record["cases"]:
        names = ("lichen", "plain", "casync", "zstd")
        table.append([case["case"], number(case["size"] / 1e6), *(number(case[n] * 100, 2) for n in names)])
    return table


def _cases(model: Path, folder: Path) -> list[dict[str, Any]]:
    """Every case of an update: what each way needs to get from the old file to the new one."""
    old, new = folder / "old.gguf", folder / "new.gguf"
    cases = [_case("a new file", None, model, folder), _case("nothing changed", model, model, folder)]
    cases.append(_case("a new adapter", None, versions.adapter(model, new, seed=1), folder))
    layers = [each.name for each in tensor_places(model) if each.name.startswith("blk.")]
    count = round(SHARE * len(tensor_places(model)))
    for title, nudge in (("8 of 272 tensors trained", versions.NUDGE), ("8 of 272 tensors new", None)):
        for seed in range(SEEDS):
            names = set(np.random.default_rng(seed).choice(layers, count, replace=False).tolist())
            versions.changed(model, new, names, nudge=nudge, seed=seed)
            cases.append(_case(f"{title}, {seed}", model, new, folder))
    embedding = {"token_embd.weight"}
    versions.changed(model, new, embedding, nudge=versions.NUDGE, seed=0)
    cases.append(_case("the embedding trained", model, new, folder))
    versions.templated(model, new, b"{{ messages[0].content }} and so on")
    cases.append(_case("another chat template", model, new, folder))
    for kind in ("F16", "BF16", "Q8_0", "Q4_1"):
        versions.converted(model, old, kind, grid=False)
        cases.append(_case(f"a new file, {kind}", None, old, folder))
        for nudge in (1e-4, 1e-3, 1e-2):
            versions.converted(model, new, kind, nudge=nudge, grid=False)
            cases.append(_case(f"all weights moved by {nudge:g}, {kind}", old, new, folder))
    versions.converted(model, new, "Q8_0")
    cases.append(_case("requantized, Q4_1 to Q8_0", model, new, folder))
    return cases


def _case(title: str, old: Path | None, new: Path, folder: Path) -> dict[str, Any]:
    print(f"{title} ...", file=sys.stderr)
    size = new.stat().st_size
    with tempfile.TemporaryDirectory(dir=folder) as place:
        costs = {
            "lichen": _cost(old, new, Path(place) / "with", differences=True),
            "plain": _cost(old, new, Path(place) / "without", differences=False),
            "casync": _casync_cost(old, new),
            "zstd": 0 if old == new else _zstd_cost(new),
        }
    return {"case": title, "size": size, **{name: cost / size for name, cost in costs.items()}}


def _cost(old: Path | None, new: Path, folder: Path, *, differences: bool) -> int:
    """Bytes that a device with the old file fetches for the new one."""
    mirror, store = folder / "mirror", Store(folder / "store")
    if old is not None:
        first = publish_file(old, mirror)
        asyncio.run(fetch(first, [FsspecMirror(f"file://{mirror}")], store))
    recipe = publish_file(new, mirror, previous=old if differences else None)
    counted = _Counted(f"file://{mirror}")

    async def pull() -> None:
        if not store.blob(recipe.sha256).is_file():
            await fetch(await find_recipe(recipe.sha256, [counted]), [counted], store)

    asyncio.run(pull())
    return counted.received


def _casync_cost(old: Path | None, new: Path) -> int:
    """Compressed bytes of the content-defined chunks that the old file does not have, indices not counted."""
    from pyfastcdc import FastCDC

    cutter = FastCDC(64 << 10)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    there: set[bytes] = set()
    if old is not None:
        there = {hashlib.sha256(chunk.data).digest() for chunk in cutter.cut_file(old)}
    cost = 0
    for chunk in cutter.cut_file(new):
        digest = hashlib.sha256(chunk.data).digest()
        if digest not in there:
            there.add(digest)
            cost += len(compressor.compress(chunk.data))
    return cost


def _zstd_cost(path: Path) -> int:
    return len(zstandard.ZstdCompressor(level=LEVEL, threads=2).compress(path.read_bytes()))


def _speed(folder: Path) -> dict[str, Any]:
    """Publishing and pulling a gigabyte of weights, each in a process of its own."""
    source = folder / "gigabyte.gguf"
    versions.gigabyte(source)
    work = folder / "speed"
    hashed = _process("hash", str(source), str(work))
    published = _process("publish", str(source), str(work / "mirror"))
    pulled = _process("pull", published["sha256"], str(work / "mirror"), str(work / "store"))
    return {"hash": hashed, "publish": published, "pull": pulled}


def _process(*work: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.chunks", "--work", *work]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _work(what: str, source: str, mirror: str, store: str = "") -> dict[str, Any]:
    """One worker's job: its seconds on the clock and of the processor, and its peak resident memory."""
    began = time.perf_counter()
    if what == "hash":
        recipe = divide(Path(source))
    elif what == "publish":
        recipe = publish_file(Path(source), Path(mirror))
    else:

        async def pull() -> Recipe:
            mirrors = [FsspecMirror(f"file://{mirror}")]
            found = await find_recipe(source, mirrors)
            await fetch(found, mirrors, Store(Path(store)))
            return found

        recipe = asyncio.run(pull())
    seconds = time.perf_counter() - began
    busy = time.process_time()
    return {
        "sha256": recipe.sha256,
        "seconds": round(seconds, 2),
        "processor_s": round(busy, 2),
        "mb_s": round(recipe.size / seconds / 1e6, 1),
        "mb_processor_s": round(recipe.size / busy / 1e6, 1),
        "peak_mb": round(_peak() / 1e6, 1),
    }


def _peak() -> int:
    """Peak resident bytes of this process; its ru_maxrss would be at least that of the parent that forked it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
