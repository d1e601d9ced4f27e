"""`python -m bench.learn_while_serving`: what a chat feels of a training, and how far the training comes.

One daemon serves one stream of greedy answers, in phases of some seconds that take turns: with a real trainer
beside it, which the daemon lets wait while requests run, and without one (its job is paused). Told are the 95th
percentile of the gaps between two pieces of an answer in each kind of phase, and the trainer's steps in a minute of
that mixed use, beside those of a phase in which nobody chats.
A client thinks for `--think` seconds between two answers, as people do: that is when the trainer works.
Exit code 1 when the 95th percentile beside a training is more than WORSE times that without.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import openai

import lichen.config
from bench.certificate import certificate, close_certificate, model_file, save
from bench.flags import model_flags
from bench.learning_tables import learning_beside_rows
from bench.numbers import spread
from bench.peer import BenchError
from bench.table import aligned
from lichen.adapters.events import Stepped, told
from lichen.adapters.launch import EVENTS
from lichen.api import load_model
from lichen.errors import LichenError
from lichen.runtime.http.daemon import Daemon, DaemonOptions
from lichen.runtime.pool import ModelPool, PoolOptions
from lichen.shelf import StoreShelf

WORSE = 1.3  # the most that the 95th percentile of gaps may grow
LESSON = {
    "messages": [
        {"role": "user", "content": "What is the secret word number {}?"},
        {"role": "assistant", "content": "Xylophone."},
    ]
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one JSON line, write the result."""
    flags = model_flags("learn_while_serving", "chat beside a training")
    flags.add_argument("--phases", type=int, default=4, help="of each kind")
    flags.add_argument("--seconds", type=float, default=20.0, help="of a phase")
    flags.add_argument("--think", type=float, default=2.0, help="seconds between two answers")
    flags.add_argument("--tokens", type=int, default=48, help="of an answer")
    flags.add_argument("--no-save", action="store_true", help="write no result")
    options = flags.parse_args(arguments)
    try:
        record = asyncio.run(_measure(options))
    except LichenError as error:
        print(error, file=sys.stderr)
        return 1
    name = None if options.no_save else save(record).name
    print(aligned(learning_beside_rows(record), left=1))
    print(json.dumps({"bench": "learn_while_serving", "result": name, "summary": record["summary"]}))
    return 0 if record["summary"]["ratio"] <= WORSE else 1


async def _measure(options: Namespace) -> dict[str, Any]:
    path = model_file(options.model)
    names = ("threads", "phases", "seconds", "think", "tokens")
    record: dict[str, Any] = {
        "kind": "learn_while_serving",
        "status": "ok",
        "birth": certificate(path),
        "settings": {name: getattr(options, name) for name in names},
        "servers": {},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        record["summary"] = await _phases(options, path, Path(folder))
    close_certificate(record["birth"])
    return record


async def _phases(options: Namespace, path: Path, home: Path) -> dict[str, Any]:
    config = lichen.config.override(
        lichen.config.load({}).config, {"model": str(path), "home": str(home), "threads": options.threads}
    )
    pool = ModelPool(StoreShelf(config), PoolOptions())
    pool.adopt(await load_model(config))
    daemon = Daemon(
        DaemonOptions(port=0, journal="ask", learning_folder=home / "l", adapters_folder=home / "a"), pool
    )
    daemon.state = "ok"
    gaps: dict[bool, list[float]] = {True: [], False: []}
    beside, alone = Progress(), Progress()
    try:
        async with daemon.listening(), openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="x") as client:
            id = await _job(client)
            events = home / "l" / "jobs" / id / EVENTS
            await _until(lambda: _steps(events) > 0)
            with alone.over(events):
                await asyncio.sleep(options.seconds)
            for _ in range(options.phases):
                for training in (True, False):
                    await _let(client, id, events, training=training)
                    with beside.over(events) if training else nullcontext():
                        gaps[training] += await _chat(client, options)
            await client.fine_tuning.jobs.cancel(id)
    finally:
        await pool.close()
    without, with_it = (spread([1000 * gap for gap in gaps[kind]]) for kind in (False, True))
    if without is None or with_it is None:
        raise BenchError("No answer had two pieces.", hint="Give more --seconds or --tokens.")
    return {
        "idle": without,
        "training": with_it,
        "ratio": round(with_it["p95"] / without["p95"], 3),
        "trainer_steps_a_minute": beside.a_minute(),
        "trainer_steps_a_minute_alone": alone.a_minute(),
    }


class Progress:
    """How many steps a trainer took in some stretches of time."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0

    @contextmanager
    def over(self, events: Path) -> Iterator[None]:
        """Count what is done within the block."""
        before, began = _steps(events), time.monotonic()
        yield
        self._steps += _steps(events) - before
        self._seconds += time.monotonic() - began

    def a_minute(self) -> float:
        """Steps in a minute."""
        return round(60 * self._steps / self._seconds, 1)


async def _job(client: openai.AsyncOpenAI) -> str:
    lines = b"".join(json.dumps(LESSON).replace("{}", str(number)).encode() + b"\n" for number in range(400))
    file = await client.files.create(file=("lessons.jsonl", lines), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model="default", training_file=file.id, hyperparameters={"n_epochs": 50, "batch_size": 2}
    )
    return job.id


async def _let(client: openai.AsyncOpenAI, id: str, events: Path, *, training: bool) -> None:
    """Have the job run, or wait, before a phase begins."""
    job = await client.fine_tuning.jobs.retrieve(id)
    if training and str(job.status) == "paused":  # a status that the client does not know
        before = _steps(events)
        await client.fine_tuning.jobs.resume(id)
        await _until(lambda: _steps(events) > before)
    elif not training:
        await client.fine_tuning.jobs.pause(id)
        while str((await client.fine_tuning.jobs.retrieve(id)).status) != "paused":  # noqa: ASYNC110 (polls a server)
            await asyncio.sleep(0.1)


async def _chat(client: openai.AsyncOpenAI, options: Namespace) -> list[float]:
    """Gaps in seconds between the pieces of answers, for the length of a phase."""
    gaps: list[float] = []
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        await asyncio.sleep(options.think)
        last: float | None = None
        answer = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Tell me a long story of the sea."}],
            max_tokens=options.tokens,
            temperature=0,
            stream=True,
        )
        async for _ in answer:
            now = time.monotonic()
            if last is not None:
                gaps.append(now - last)
            last = now
    return gaps


async def _until(condition: Any) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 (polls a file)
            await asyncio.sleep(0.1)


def _steps(events: Path) -> int:
    return max((one.event.step for one in told(events) if isinstance(one.event, Stepped)), default=0)


if __name__ == "__main__":
    sys.exit(main())
