"""A model file out of another place on this machine: copied, or taken out of a zip."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from lichen.errors import SourceError
from lichen.sync.download import CHUNK, check_space, write_error


def copy(source: Path, target: Path, report: Callable[[int, int], None]) -> None:
    """Copy a file, telling bytes done and in all. Blocks. Raises DiskFull, StoreError."""
    total = source.stat().st_size
    check_space(target.parent, total)
    done = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(CHUNK):
            try:
                writer.write(data)
            except OSError as error:
                raise write_error(target, error) from error
            done += len(data)
            report(done, total)


def extract(archive: Path, member: str, target: Path, report: Callable[[int, int], None]) -> None:
    """Take one GGUF out of a zip, never more bytes than the zip says it has."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            info = _member(bundle, member)
            check_space(target.parent, info.file_size)
            done = 0
            with bundle.open(info) as reader, target.open("wb") as writer:
                while data := reader.read(CHUNK):
                    done += len(data)
                    if done > info.file_size:
                        raise SourceError(f"{info.filename} is larger than its archive says.")
                    writer.write(data)
                    report(done, info.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"The downloaded archive is damaged: {error}.") from error


def _member(bundle: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    """The wanted GGUF: by its path, by its file name, or the only one there is."""
    models = [info for info in bundle.infolist() if info.filename.endswith(".gguf") and not info.is_dir()]
    wanted = [info for info in models if member in ("", info.filename, info.filename.rpartition("/")[2])]
    if len(wanted) != 1:
        there = ", ".join(info.filename for info in models[:8]) or "none"
        raise SourceError(
            f"The archive has {len(wanted)} files that fit {member or 'a GGUF'}.",
            hint=f"GGUF files: {there}.",
        )
    return wanted[0]
