"""A result's birth certificate: which code, which model, which machine, and where the result is kept."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import lichen.config
from bench.peer import ROOT, BenchError
from lichen.devices.probe import probe
from lichen.sync.store import Store

RESULTS = ROOT / "bench" / "results"
OUTPUTS = (
    ":!bench/results",
    ":!docs/img",
    ":!docs/benchmarks.md",
)  # writing a result is no change of the code


def certificate(model: Path) -> dict[str, Any]:
    """Taken before the run; `close_certificate` adds what is known after it."""
    model_born = {"file": model.name, "sha256": _sha256(model), "size": model.stat().st_size}
    return machine_certificate() | {"model": model_born}


def machine_certificate() -> dict[str, Any]:
    """A certificate of a run without a model."""
    machine = probe()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", *OUTPUTS)),
        "machine": {
            "cpu": machine.cpu,
            "isa": machine.isa,
            "features": list(machine.features),
            "cores": machine.cores,
            "physical_cores": machine.physical_cores,
            "memory_gb": round(machine.memory_total / 1e9, 1),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        "load_before": list(os.getloadavg()),
    }


def close_certificate(birth: dict[str, Any]) -> None:
    """Add the load average after the run."""
    birth["load_after"] = list(os.getloadavg())


def save(record: dict[str, Any]) -> Path:
    """Write `bench/results/<date>-<kind>-<commit>.json`; a second run of that day gets a number."""
    birth = record["birth"]
    stem = f"{birth['date'][:10]}-{record['kind']}-{birth['commit'][:10]}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{stem}.json"
    number = 2
    while path.exists():
        path = RESULTS / f"{stem}-{number}.json"
        number += 1
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def model_file(reference: str) -> Path:
    """A path, or a model of the store, which is pulled when it is not there. Raises LichenError."""
    path = Path(reference).expanduser()
    if path.is_file():
        return path.resolve()
    config = lichen.config.load().config
    store = Store(config.home / "store", offline=config.offline)
    manifest = store.resolve(reference) or asyncio.run(store.pull(reference))
    return store.blob_path(manifest)


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BenchError(
            f"git {arguments[0]} failed: {result.stderr.strip()}", hint="Benchmarks run from a clone."
        )
    return result.stdout.strip()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
