"""Small text files in which Linux tells of its hardware, read with bounds and parsed with suspicion.

A `Files` maps absolute paths to their texts, so that a laptop, a container and a GPU box can stand in
tests as dictionaries. Texts are outside input: in a container they may be bound over by anything, so a
number out of bounds or a list that never ends is as good as missing. Nothing here raises for what it reads.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

Files: TypeAlias = Mapping[str, str]

MAX_BYTES = 1 << 16  # of one file
MAX_FILES = 1 << 14  # that one pattern may match
MAX_PROCESSOR = 1 << 13  # Linux is built for at most 8,192 processors
MAX_NUMBER = 1 << 60

_NUMBERED = re.compile(r"\d+")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_files(patterns: Iterable[str], root: Path = Path("/")) -> dict[str, str]:
    """Texts of the regular files that match any of the absolute glob patterns, below `root`.

    The keys are paths as they would be below "/". Unreadable, long and special files are left out.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            paths = [*itertools.islice(root.glob(pattern.lstrip("/")), MAX_FILES)]
        except OSError:
            continue
        for path in paths:
            if (text := read_text(path)) is not None:
                found["/" + path.relative_to(root).as_posix()] = text
    return found


def read_text(path: Path, limit: int = MAX_BYTES) -> str | None:
    """What a regular file says, without white space around it; None when it cannot be had or is too long."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return None
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError):  # ValueError: a path with a null byte
        return None
    return data.decode("utf-8", "replace").strip() if len(data) <= limit else None


def matching(files: Files, pattern: str) -> Iterator[tuple[str, str]]:
    """Path and text of each file that matches a pattern, by the numbers in their names."""
    names = [name for name in files if fnmatch.fnmatchcase(name, pattern)]
    for name in sorted(names, key=by_numbers):
        yield name, files[name]


def by_numbers(name: str) -> tuple[tuple[int, ...], str]:
    """A key that sorts cpu2 before cpu10."""
    return tuple(int(number[:18]) for number in _NUMBERED.findall(name)), name


def number(text: str | None) -> int | None:
    """A whole number from 0 to 2^60; None for anything else."""
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 19:
        return None
    value = int(text)
    return value if value <= MAX_NUMBER else None


def size(text: str | None) -> int | None:
    """Bytes of a size such as 48K or 32M (units of 1,024); None for anything else."""
    if not text:
        return None
    unit = text[-1].upper() if text[-1].isalpha() else ""
    count = number(text[: len(text) - len(unit)])
    if count is None or unit not in _UNITS or count * _UNITS[unit] > MAX_NUMBER:
        return None
    return count * _UNITS[unit]


def number_list(text: str | None) -> frozenset[int]:
    """Numbers of a list such as 0-3,8,10-11; empty when any part of it is no range of processors."""
    found: set[int] = set()
    for part in (text or "").split(","):
        first, dash, last = part.strip().partition("-")
        start = number(first)
        end = number(last) if dash else start
        if start is None or end is None or not start <= end < MAX_PROCESSOR:
            return frozenset()
        found.update(range(start, end + 1))
    return frozenset(found)


def in_name(name: str, what: str) -> int | None:
    """The number behind `what` in a path, such as 3 for "cpu" in /sys/.../cpu3/topology."""
    found = re.search(rf"/{what}(\d{{1,6}})(?:/|$)", name)
    return int(found[1]) if found else None
