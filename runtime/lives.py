"""What was lived with each version of an adapter: answers that were given under its name, counted.

A life belongs to (name, digest); the digest "" is the model alone under that name, after a rollback. Counted
are complete answers with the adapter as it is, in memory at first; `flush` adds them to the file, under a
lock, so that daemons that share a home share a life. What a `kill -9` costs is what came since the last
flush. The file is sealed: one that is damaged gives way to the one before it, or to an empty one, with a
warning; it holds counts, and no texts. Ratings are not here: the journal has them (`Journal.ratings`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import msgspec

from lichen.adapters.watch import Lived
from lichen.durable import SealedFile
from lichen.runtime.sequence import Sequence

log = logging.getLogger("lichen.learning")

FILE, LOCK = "lives.json", ".lives.lock"
TITLE = "lichen lives 1"
LOCKED_S = 10.0


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """answers: all of them; tokens: of them; since, until: of the first and of the last, in seconds since
    1970. lived: what is compared, of those that were scored; its ratings stay 0 here."""

    answers: int = 0
    tokens: int = 0
    since: float = 0.0
    until: float = 0.0
    lived: Lived = Lived()

    def __add__(self, other: Life) -> Life:
        if not (self.answers and other.answers):
            return self if self.answers else other
        return Life(
            answers=self.answers + other.answers,
            tokens=self.tokens + other.tokens,
            since=min(self.since, other.since),
            until=max(self.until, other.until),
            lived=self.lived + other.lived,
        )


Told = Callable[[Sequence], None]


class Lives:
    """Of the adapters of a registry, in its folder. What counts belongs to one event loop; what says that it
    blocks may run on any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._new: dict[str, dict[str, Life]] = {}  # by name and digest, not yet in a file

    def told(self, name: str, digest: str) -> Told:
        """Who takes complete answers of a version."""
        return functools.partial(self._count, name, digest)

    async def flush(self, name: str) -> dict[str, Life]:
        """Add to the file what came since, durably; all lives of the name. What fails is tried again by the
        next one. Raises OSError."""
        new = self._new.pop(name, {})
        try:
            return await asyncio.to_thread(self._add, name, new)
        except OSError:
            self._new[name] = _sum(new, self._new.get(name, {}))
            raise

    def of(self, name: str) -> dict[str, Life]:
        """The lives of a name's versions by digest, "" for the model alone, as flushed. Blocks."""
        return self._read(name) or {}

    def _count(self, name: str, digest: str, sequence: Sequence) -> None:
        self._new[name] = _sum(self._new.get(name, {}), {digest: life_of(sequence, time.time())})

    def _add(self, name: str, new: dict[str, Life]) -> dict[str, Life]:
        place = self._folder / name
        lives = self._read(name)
        if (lives is not None and not new) or not place.is_dir():  # nothing came, or the name is gone
            return lives or {}
        with filelock.FileLock(place / LOCK, timeout=LOCKED_S):
            lives = self._read(name)
            if lives is None:
                log.warning(
                    "%s is damaged: the answers of %s are counted anew; ratings are not lost.",
                    place / FILE,
                    name,
                )
            there = {digest: life for digest, life in (lives or {}).items() if (place / digest).is_dir()}
            lives = _sum(there, new)
            self._file(name).save(msgspec.json.format(msgspec.json.encode(lives)))
        return lives

    def _read(self, name: str) -> dict[str, Life] | None:
        """None for a damaged file."""
        file = self._file(name)
        for body in file.whole():
            try:
                return msgspec.json.decode(body, type=dict[str, Life])
            except msgspec.MsgspecError:
                continue
        return None if file.present() else {}

    def _file(self, name: str) -> SealedFile:
        return SealedFile(self._folder / name / FILE, TITLE)


def _sum(one: dict[str, Life], other: dict[str, Life]) -> dict[str, Life]:
    return {key: one.get(key, Life()) + other.get(key, Life()) for key in one.keys() | other.keys()}


def life_of(sequence: Sequence, now: float) -> Life:
    """One complete answer."""
    lived = Lived(drafted=sequence.drafted, accepted=sequence.accepted)
    if sequence.scored_tokens and math.isfinite(sequence.loss):
        loss = sequence.loss / sequence.scored_tokens
        lived = msgspec.structs.replace(lived, answers=1, loss=loss, squares=loss * loss)
    return Life(answers=1, tokens=sequence.drawn, since=now, until=now, lived=lived)
