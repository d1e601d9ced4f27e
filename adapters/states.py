"""What a draft head learns from: hidden states and likeliest tokens of answers, in segment files.

A folder holds `<number>.states`, the newest with the highest number, each an uncompressed npz (a zip, whose
checksums find damage) of several runs of tokens. These files say what was answered: they are 0600 in a folder
of 0700, and never leave the device. It is a cache: a file that cannot be read is left out, with a line in
the log.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lichen.durable import write_file

log = logging.getLogger("lichen.distil")

TOP = 16  # likeliest tokens that are kept of each position
BLOCK = 256  # tokens of the vocabulary that are looked at together
SUFFIX = ".states"


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """n tokens of one answer in a row. tokens: int32 [n + 1]. states: float16 [n, H], after each of the
    first n tokens. top: int32 [n, TOP], the likeliest tokens that follow, and chances: float16 [n, TOP],
    their natural-log probabilities. tokens[i + 1] was drawn from states[i]."""

    tokens: npt.NDArray[np.int32]
    states: npt.NDArray[np.float16]
    top: npt.NDArray[np.int32]
    chances: npt.NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.states)


def likeliest(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
    """The TOP likeliest tokens [TOP] int32, best first, and their log-probabilities [TOP] float16.

    The best TOP of all are among the TOP blocks with the highest maxima, which is 5 times faster than to
    part the whole row of 49,152.
    """
    peak = logits.max()
    norm = peak + np.log(np.exp(logits - peak).sum())
    whole = len(logits) // BLOCK * BLOCK
    blocks = logits[:whole].reshape(-1, BLOCK)
    if len(blocks) > TOP:
        chosen = np.argpartition(blocks.max(axis=1), -TOP)[-TOP:]
        places = (chosen[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        places = np.concatenate([places, np.arange(whole, len(logits))])
    else:
        places = np.arange(len(logits))
    near = logits[places]
    best = np.argpartition(near, -TOP)[-TOP:]
    best = best[np.argsort(-near[best], kind="stable")]
    return places[best].astype(np.int32), (near[best] - norm).astype(np.float16)


def segment_files(folder: Path) -> list[Path]:
    """The segments of a folder, the oldest first."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())


def write_segment(folder: Path, runs: Sequence[Run]) -> Path:
    """Write runs as the newest segment. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    there = segment_files(folder)
    number = int(there[-1].stem) + 1 if there else 1
    buffer = io.BytesIO()
    np.savez(
        buffer,
        lengths=np.array([len(run) for run in runs], np.int64),
        tokens=np.concatenate([run.tokens for run in runs]),
        states=np.concatenate([run.states for run in runs]),
        top=np.concatenate([run.top for run in runs]),
        chances=np.concatenate([run.chances for run in runs]),
    )
    path = folder / f"{number:08d}{SUFFIX}"
    write_file(path, buffer.getvalue(), mode=0o600)
    return path


def read_segments(paths: Sequence[Path], *, hidden: int, vocabulary: int) -> Iterator[Run]:
    """All runs of these files that fit a model, in order; a file that is damaged or gone is left out."""
    for path in paths:
        try:
            yield from _read(path, hidden, vocabulary)
        except FileNotFoundError:
            continue  # the oldest are deleted at any time
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is left out of the distillation: %s.", path.name, error)


def _read(path: Path, hidden: int, vocabulary: int) -> list[Run]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        lengths, tokens = file["lengths"], file["tokens"]
        states, top, chances = file["states"], file["top"], file["chances"]
    n = int(lengths.sum()) if lengths.ndim == 1 and lengths.dtype == np.int64 and (lengths > 0).all() else 0
    sound = (
        n > 0
        and (tokens.dtype, states.dtype, top.dtype, chances.dtype)
        == (np.int32, np.float16, np.int32, np.float16)
        and tokens.shape == (n + len(lengths),)
        and states.shape == (n, hidden)
        and top.shape == chances.shape == (n, TOP)
        and min(tokens.min(), top.min()) >= 0
        and max(tokens.max(), top.max()) < vocabulary
        and bool(np.isfinite(states).all() and np.isfinite(chances).all())
    )
    if not sound:
        raise ValueError("it does not hold what it should")
    runs = []
    start = 0
    for number, length in enumerate(lengths.tolist()):
        stop = start + length
        own = tokens[start + number : stop + number + 1]
        runs.append(Run(own, states[start:stop], top[start:stop], chances[start:stop]))
        start = stop
    return runs
