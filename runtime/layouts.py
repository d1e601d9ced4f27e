"""Layouts: a model's weights stored as another type, made on this machine from the file that was asked for.

A layout is a model of the store whose source says what it was made of, so it is listed, reused and removed
as any other. Beside it lies a record of how far its predictions are from the file's: their mean KL divergence
on text that the model itself wrote, measured when it is made. A layout is made by a process of its own, at
the lowest priority (`layout_maker.py`), and one that is damaged or lost is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from lichen.durable import write_file
from lichen.errors import EngineError, LichenError, StoreError
from lichen.quant.gguf_check import GGUFSummary
from lichen.sync.store import ModelManifest, Store

log = logging.getLogger("lichen.layouts")

FOLDER = "layouts"  # of records, below lichen's home
SOURCE = "source"  # the layout of the file as it is

# Mean KL to expect of a layout before it is made, in nats a token: measured on layouts that were made from a
# Q4_1 file (docs/log.md). It is not the weights, which stay, but the activations, which each type's kernel
# rounds in its own way. Types with fewer bits lose much and are only made where somebody asks for them.
EXPECTED_KL = {"q8_0": 6.5e-3, "f16": 4e-3}

_MAIN_SHARE = 0.5  # of the bytes of all matrices: what a file is mostly stored as


class LayoutRecord(msgspec.Struct, frozen=True, kw_only=True, tag="record"):
    """A layout that was made. model: sha256 of the file that was asked for; sha256: of the layout's. kl: mean
    divergence from the former in nats, over `positions` tokens."""

    model: str
    layout: str
    sha256: str
    kl: float
    positions: int


class LayoutProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How far one is: the stage in a word, and the share of it that is done."""

    stage: str
    done: float


_TOLD: msgspec.json.Decoder[LayoutRecord | LayoutProgress] = msgspec.json.Decoder(
    LayoutRecord | LayoutProgress
)


def reference(model: str, layout: str) -> str:
    """The source under which the store keeps a layout of the file with this sha256."""
    return f"layout:{layout}:{model}"


def worth_measuring(summary: GGUFSummary) -> list[str]:
    """Layouts that a plan may choose of: the file as it is, and others that keep its quality."""
    total = sum(summary.matrix_bytes.values())
    main = {kind.lower() for kind, size in summary.matrix_bytes.items() if size > _MAIN_SHARE * total}
    return [SOURCE, *(name for name in EXPECTED_KL if name not in main)]


def find(home: Path, model: str, layout: str) -> tuple[ModelManifest, Path] | None:
    """A layout that is here, with its file; None if it has to be made."""
    store = Store(home / "store", offline=True)
    manifest = store.resolve(reference(model, layout))
    return None if manifest is None else (manifest, store.blob_path(manifest))


def divergence(home: Path, model: str) -> dict[str, float]:
    """Mean KL of each layout of a model: as measured where it was made, as expected elsewhere."""
    known = dict(EXPECTED_KL)
    for path in sorted((home / FOLDER).glob(f"{model[:16]}-*.json")):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=LayoutRecord)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s cannot be used (%s); what is expected counts.", path.name, error)
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        if record.model == model and 0 <= record.kl < float("inf"):
            known[record.layout] = record.kl
    return known


def keep_record(home: Path, record: LayoutRecord) -> None:
    """Write it down. Raises StoreError."""
    path = home / FOLDER / f"{record.model[:16]}-{record.layout}.json"
    try:
        write_file(path, msgspec.json.encode(record))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from error


async def make(
    source: Path,
    model: str,
    layout: str,
    home: Path,
    *,
    progress: Callable[[LayoutProgress], None] = lambda now: None,
) -> LayoutRecord:
    """Make a layout in a process of its own, unless it is here; cancelling ends the process.

    source: the file, whose sha256 is `model`. Raises EngineError with the reason when it fails.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lichen.runtime.layout_maker", str(source), model, layout, str(home)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    errors = asyncio.create_task(process.stderr.read())
    record = None
    try:
        async for line in process.stdout:
            told = _TOLD.decode(line)
            if isinstance(told, LayoutRecord):
                record = told
            else:
                progress(told)
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
        text = (await errors).decode("utf-8", "replace").strip()
    if record is None:
        reason = text.splitlines()[-1] if text else f"exit code {code}"
        raise EngineError(f"The layout {layout} could not be made: {reason[:300]}")
    return record


def complaint(error: LichenError) -> str:
    """One line for `make`, which reads it from the process's standard error."""
    return " ".join(str(error).split())
