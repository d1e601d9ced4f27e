"""Files to learn from, as JSON lines: conversations, prompts with completions, and preference pairs.

The forms are those of OpenAI's fine-tuning files:

    {"messages": [..., {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "completion": "..."}
    {"input": {"messages": [...], "tools": [...]}, "preferred_output": [...], "non_preferred_output": [...]}

`survey` reads a file once and tells what is wrong with it, line by line, before anything is learned;
`read_lessons` then gives its good lines. Both stream: a line has at most MAX_LINE bytes, a longer one is
skipped without being held, and of each lesson only 8 bytes are remembered, to find duplicates.

The held-out part is chosen by a hash of what comes before the answer, so that the same question with
two answers never stands on both sides, and the choice is the same in every run and whatever the order. Of few
lessons (16 to 80) a larger share is held out, so that a gate has enough to measure on; as such a file grows,
held-out questions become taught ones, never the other way round.

Not covered: images and audio, and whether a conversation fits a model's context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from lichen.adapters.lesson_forms import Lesson, LineFault, lesson_of
from lichen.adapters.records import LessonKind
from lichen.errors import LessonError

MAX_LINE = 1 << 20  # bytes
MAX_LESSONS = 1_000_000  # in one file; 8 bytes of each are remembered in a set: at most 100 MB
SHOWN = 20  # faults that a report holds; the rest are counted
HELD_OUT = 0.1  # share of the lessons that measure instead of teach
MEASURING = 8  # lessons that are to measure where a file has few, but twice as many at least
_BOM = b"\xef\xbb\xbf"

Part = Literal["train", "held_out"]


class Fault(msgspec.Struct, frozen=True):
    """One bad line: its number from 1 (0: the file as a whole), what is wrong, and what to do."""

    line: int
    what: str
    advice: str

    def __str__(self) -> str:
        return (
            f"line {self.line}: {self.what} ({self.advice})" if self.line else f"{self.what} ({self.advice})"
        )


class Report(msgspec.Struct, kw_only=True):
    """What a survey found. kind: of all lessons in the file; faults: the first SHOWN of fault_count."""

    lines: int = 0
    train: int = 0
    held_out: int = 0
    duplicates: int = 0
    kind: LessonKind | None = None
    faults: list[Fault] = []
    fault_count: int = 0

    @property
    def lessons(self) -> int:
        """Good lines, each once."""
        return self.train + self.held_out

    def require_sound(self) -> None:
        """Raise LessonError with the first bad lines, if there are any."""
        if not self.fault_count:
            return
        shown = "; ".join(map(str, self.faults[:3]))
        more = self.fault_count - min(3, len(self.faults))
        raise LessonError(
            f"The file cannot be learned from: {shown}" + (f"; and {more:,} more." if more else "."),
            param="file",
        )

    def _add(self, line: int, fault: LineFault) -> None:
        self.fault_count += 1
        if len(self.faults) < SHOWN:
            self.faults.append(Fault(line, fault.what, fault.advice))


def survey(path: Path, *, share: float | None = None) -> Report:
    """Read a whole file and say what is in it and what is wrong. share: of the held-out part, or `share_of`.

    Raises LessonError for a file that cannot be opened; what its lines hold is in the report.
    """
    report = Report()
    share = share_of(path) if share is None else share
    with _opened(path) as stream:
        for _ in _lessons(stream, report, share):
            pass
    return report


def share_of(path: Path) -> float:
    """The share of a file's lessons that is held out: HELD_OUT, or as much as gives MEASURING of few.

    Reads no further than it must. Raises LessonError as `survey`.
    """
    enough = round(MEASURING / HELD_OUT)
    with _opened(path) as stream:
        count = sum(1 for _ in islice(_lessons(stream, Report(), HELD_OUT), enough))
    return MEASURING / count if count >= 2 * MEASURING else HELD_OUT


def read_lessons(path: Path, part: Part | None = None, *, share: float | None = None) -> Iterator[Lesson]:
    """The good lines of a file, each once, of one part or (None) of both. Raises LessonError as `survey`."""
    share = share_of(path) if share is None else share
    with _opened(path) as stream:
        for lesson, side in _lessons(stream, Report(), share):
            if part in (None, side):
                yield lesson


def side_of(lesson: Lesson, share: float = HELD_OUT) -> Part:
    """Which part a lesson belongs to, by the hash of its question alone."""
    number = int.from_bytes(hashlib.blake2b(lesson.question(), digest_size=8).digest(), "big")
    return "held_out" if number < share * (1 << 64) else "train"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise LessonError(f"The file {path} cannot be read: {error.strerror or error}.") from error


def _lessons(stream: BinaryIO, report: Report, share: float) -> Iterator[tuple[Lesson, Part]]:
    """Good lessons with their part; what is wrong goes into the report."""
    seen: set[bytes] = set()
    for number, line in _lines(stream):
        report.lines = number
        try:
            lesson = lesson_of(_text_of(line))
            report.kind = report.kind or lesson.kind
            if (lesson.kind == "preference") != (report.kind == "preference"):
                raise LineFault(
                    f"this is a {lesson.kind} lesson in a file of {report.kind} lessons",
                    "keep preference pairs in a file of their own",
                )
            if len(seen) >= MAX_LESSONS:
                raise LineFault(f"there are more than {MAX_LESSONS:,} lessons", "split the file")
        except LineFault as fault:
            report._add(number, fault)
            continue
        digest = hashlib.blake2b(lesson.question() + b"\0" + lesson.answer(), digest_size=8).digest()
        if digest in seen:
            report.duplicates += 1
            continue
        seen.add(digest)
        side = side_of(lesson, share)
        if side == "train":
            report.train += 1
        else:
            report.held_out += 1
        yield lesson, side
    if not report.lessons and not report.fault_count:
        report._add(0, LineFault("the file holds no lesson", "write one JSON object a line"))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that hold something, without their ends; None for one that is too long."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if stripped := line.strip():
            yield number, stripped


def _text_of(line: bytes | None) -> bytes:
    if line is None:
        raise LineFault(f"the line is longer than {MAX_LINE:,} bytes", "split or shorten its texts")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineFault(f"byte {error.start + 1} of it is not UTF-8", "save the file as UTF-8") from error
    return line
