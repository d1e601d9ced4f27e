"""From token bytes to text that may be shown: whole characters only, and nothing of a stop string.

A token may end in the middle of a UTF-8 character, and a stop string may span tokens; both are held
back here until it is certain what they are.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental detokenizer and stop matcher of one sequence."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Text that is certain after these bytes; sets `stopped` when a stop string is complete."""
        text = self._decoder.decode(piece)
        if not self._stop:
            return text
        self._held += text
        end = min((at for at in (self._held.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if end >= 0:
            self.stopped = True
            shown, self._held = self._held[:end], ""
            return shown
        keep = max(overlap(self._held, stop) for stop in self._stop)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once no more tokens come; an unfinished character is dropped."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (shorter than `stop`)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
