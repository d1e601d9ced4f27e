"""Curves from measurements of a machine whose costs are known, in any order, interrupted and damaged."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.devices.fingerprint import (
    CHUNKS,
    PAIRED,
    WIDTHS,
    Key,
    Record,
    Sample,
    Shape,
    Task,
    extrapolate,
    fingerprint,
    tasks,
    thread_counts,
    typical,
)
from lichen.devices.fingerprint_cache import FingerprintCache
from lichen.devices.schedule import Progress, measure, missing
from lichen.errors import ConfigError, EngineError, StoreError

KEY = Key(hardware="abc", model="0" * 64, layout="source", library="1.0")
SHAPE = Shape(
    layers=(2, 10),
    layer_bytes=(200, 1000),
    whole_layers=30,
    whole_layer_bytes=3000,
    tensor_bytes=4000,
    read_bytes=3500,
)
WANTED = tasks(2)
TOKEN_S, LAYER_TOKEN_S, CELL_S, ROW_S = 0.01, 0.0005, 1e-7, 0.002  # with one thread
ALONE = 3  # times what a token of a prompt takes for a cell


class KnownBench:
    """A machine of which every cost is known; `fails` samples from now on it raises."""

    def __init__(self, noise: float = 0.0) -> None:
        self.shape = SHAPE
        self.taken: list[Task] = []
        self.fails = -1
        self.noise, self.chance = noise, random.Random(1)

    def measure(self, task: Task) -> Sample:
        if self.fails == 0:
            raise EngineError("The engine failed.")
        self.fails -= 1
        self.taken.append(task)
        slower = 1 + self.noise * self.chance.random() ** 2
        if task.kind in PAIRED:
            count, near = SHAPE.layers[task.kind == "alone"], msgspec.structs.replace(task, depth=0)
            return tuple(cost(one, count) * slower for one in (near, task))
        return tuple(cost(task, count) * (1 if task.samples(2) == 1 else slower) for count in SHAPE.layers)


def cost(task: Task, layers: int) -> float:
    """What a model of so many layers costs, in closed form."""
    match task.kind:
        case "load":
            return 0.05 + 0.01 * layers
        case "resident":
            return 5000 + 2 * 100 * layers  # weights are there twice: they are repacked
        case "buffers":
            return 1000.0 + 10 * task.tokens
        case "cells":
            return 7.0 * layers
    rows = task.tokens if task.kind == "decode" else 1
    own = task.tokens * (task.tokens + 1) / 2 if task.kind in ("chunk", "depth") else 0
    attended = own + task.tokens * task.depth * (ALONE if task.kind in ("alone", "decode") else 1)
    reading = attended * CELL_S * (0.5 if task.kv == "q8_0" else 1) * layers
    return (TOKEN_S + LAYER_TOKEN_S * layers * task.tokens + (rows - 1) * ROW_S + reading) / task.threads


def measured(bench: KnownBench, record: Record, **options: int) -> bool:
    kept: list[Record] = []
    return measure(bench, record, WANTED, save=kept.append, rounds=options.get("rounds", 1), budget_s=1e9)


# ---- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_known_costs_come_back(noise: float) -> None:
    record = Record(key=KEY, shape=SHAPE)
    assert measured(KnownBench(noise), record, rounds=9)
    found = fingerprint(record, WANTED)
    assert found is not None
    near = 1e-6 + noise * 0.5
    slower = 1 + noise / 3  # in the mean
    for threads in (1, 2):
        for n in (*WIDTHS, *CHUNKS):
            whole = (TOKEN_S + LAYER_TOKEN_S * 30 * n) / threads
            assert found.seconds(n, threads=threads) == pytest.approx(slower * whole, rel=near)
        wide = cost(Task(kind="decode", threads=threads, tokens=16), 30)
        assert found.seconds(16, threads=threads, rows=16) == pytest.approx(slower * wide, rel=near)
    if noise:
        return
    deep = cost(Task(kind="decode", tokens=8, depth=3000, kv="q8_0"), 30)
    assert found.seconds(8, threads=1, rows=8, alone=8 * 3000, kv_type="q8_0") == pytest.approx(deep)
    chunk = (TOKEN_S + LAYER_TOKEN_S * 30 * 64 + 64 * 1000 * CELL_S * 30) / 2
    assert found.seconds(64, threads=2, attended=64 * 1000) == pytest.approx(chunk)
    assert found.cache("f16").cell_bytes == 210
    assert found.load_seconds == pytest.approx(0.35)
    assert (found.weight_bytes, found.fixed_bytes) == (8000, 3000)
    assert found.compute.at(64) == pytest.approx(1640)
    assert found.bandwidth == pytest.approx(3500 / found.seconds(1, threads=2))


def test_nothing_is_said_while_something_is_unknown() -> None:
    record, bench = Record(key=KEY, shape=SHAPE), KnownBench()
    for task in WANTED[:-1]:
        record.add(task, bench.measure(task))
    assert fingerprint(record, WANTED) is None
    assert record.whole(WANTED[-1]) is None


def test_a_model_of_one_layer_and_a_line_that_falls() -> None:
    assert extrapolate(SHAPE, (3.0, 7.0)) == pytest.approx(17.0)
    assert extrapolate(SHAPE, (7.0, 3.0)) == 5.0
    assert extrapolate(SHAPE, (7.0,)) == 7.0
    assert typical([(9.0,), (2.0,), (5.0,)]) == (5.0,)
    assert typical([(float(n), -float(n)) for n in range(8)]) == (3.5, -3.5)


@pytest.mark.parametrize(
    "sample", [(1.0,), (1.0, float("nan")), (1.0, -2.0), (1.0, 0.0), (1.0, float("inf"))]
)
def test_what_no_measurement_gives_is_refused(sample: Sample) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        Record(key=KEY, shape=SHAPE).add(Task(kind="load"), sample)


def test_threads() -> None:
    assert [thread_counts(count) for count in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]
    assert len({task.key for task in tasks(8)}) == len(tasks(8))


# ---- the schedule ---------------------------------------------------------------------------------


def test_rounds_alternate_and_sizes_are_taken_once() -> None:
    record, bench = Record(key=KEY, shape=SHAPE), KnownBench()
    assert measured(bench, record, rounds=3)
    assert bench.taken[: len(WANTED)] == WANTED
    assert all(record.count(task) == task.samples(3) for task in WANTED)
    assert not missing(record, WANTED, 3)


@pytest.mark.parametrize("at", [0, 1, 20, 40])
def test_what_was_measured_before_an_error_is_kept_and_continued(at: int) -> None:
    record, bench = Record(key=KEY, shape=SHAPE), KnownBench()
    kept: list[int] = []

    def save(now: Record) -> None:
        kept.append(sum(map(len, now.samples.values())))

    bench.fails = at
    with pytest.raises(EngineError):
        measure(bench, record, WANTED, save=save, rounds=2, budget_s=1e9)
    assert kept[-1] == at
    bench.fails = -1
    assert measure(bench, record, WANTED, save=save, rounds=2, budget_s=1e9)
    whole = Record(key=KEY, shape=SHAPE)
    measured(KnownBench(), whole, rounds=2)
    assert record == whole
    assert kept[-1] == len(bench.taken)


def test_a_budget_is_kept_after_the_first_round_and_a_stop_at_once() -> None:
    now, record, bench = [0.0], Record(key=KEY, shape=SHAPE), KnownBench()
    told: list[Progress] = []

    def clock() -> float:
        now[0] += 1
        return now[0]

    options = {"save": lambda kept: None, "rounds": 5, "clock": clock, "progress": told.append}
    assert measure(bench, record, WANTED, budget_s=3, **options)  # type: ignore[arg-type]
    assert bench.taken == WANTED
    assert told[0].done == 0 and told[-1].total > len(WANTED)
    fresh = Record(key=KEY, shape=SHAPE)
    assert not measure(
        bench, fresh, WANTED, save=lambda kept: None, stopped=lambda: len(bench.taken) > len(WANTED) + 3
    )
    assert sum(map(len, fresh.samples.values())) == 4


# ---- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> tuple[FingerprintCache, Path, Record]:
    """A cache with one record, and its file."""
    record = Record(key=KEY, shape=SHAPE)
    measured(KnownBench(), record)
    cache = FingerprintCache(tmp_path / "cache")
    cache.save(record)
    (path,) = (tmp_path / "cache").iterdir()
    return cache, path, record


def test_a_record_comes_back(kept: tuple[FingerprintCache, Path, Record]) -> None:
    cache, path, record = kept
    assert cache.find(KEY) == cache.load(KEY, SHAPE) == record
    assert path.name.startswith("abc-000000000000-1.0-source-")
    assert cache.find(Key(hardware="abc", model="0" * 64, layout="source", library="2.0")) is None
    other = Shape(**{**{name: getattr(SHAPE, name) for name in SHAPE.__struct_fields__}, "layers": (1, 10)})
    assert cache.load(KEY, other).samples == {}
    cache.forget(KEY)
    cache.forget(KEY)
    assert cache.find(KEY) is None


def damages(text: str) -> list[bytes]:
    """Bad forms of a file: cut, foreign, lying and hostile."""
    whole = json.loads(text)
    first = next(iter(whole["samples"]))
    lies = [
        whole | {"version": 99},
        whole | {"key": whole["key"] | {"model": "1" * 64}},
        whole | {"samples": whole["samples"] | {first: [[1e999, 1.0]]}},
        whole | {"samples": whole["samples"] | {first: [[1.0]]}},
        whole | {"samples": whole["samples"] | {first: [[1.0, 1.0]] * 2000}},
        whole | {"shape": whole["shape"] | {"layers": []}},
        whole | {"shape": whole["shape"] | {"layer_bytes": [1]}},
        [],
    ]
    return [
        b"",
        text.encode()[:-9],
        b"\xff\xfe",
        b"[" * 60_000,
        b" " * (2 << 20),
        *(json.dumps(lie).encode() for lie in lies),
    ]


@pytest.mark.parametrize("number", range(13))
def test_a_bad_file_is_dropped_and_made_again(
    kept: tuple[FingerprintCache, Path, Record], number: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache, path, _ = kept
    path.write_bytes(damages(path.read_text())[number])
    with caplog.at_level(logging.WARNING, "lichen.devices"):
        record = cache.load(KEY, SHAPE)
    assert record.samples == {}
    assert "it is measured again" in caplog.text
    assert not path.exists()
    measured(KnownBench(), record)
    cache.save(record)
    assert cache.find(KEY) == record


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 4000))
def test_whatever_a_file_holds_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    record, cache = Record(key=KEY, shape=SHAPE), FingerprintCache(folder)
    measured(KnownBench(), record)
    cache.save(record)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:place] + noise + data[place + len(noise) :])
    found = cache.load(KEY, SHAPE)
    assert all(samples for samples in found.samples.values())


def test_other_layouts_lend_what_they_share(kept: tuple[FingerprintCache, Path, Record]) -> None:
    cache, _, record = kept
    other = Record(key=Key(hardware="abc", model="0" * 64, layout="q8_0", library="1.0"), shape=SHAPE)
    cache.borrow(other, WANTED)
    assert {task for task in WANTED if other.count(task)} == {task for task in WANTED if task.shared}
    for task in WANTED:
        assert not task.shared or other.samples[task.key] == record.samples[task.key]
    foreign = Record(key=Key(hardware="abc", model="1" * 64, layout="q8_0", library="1.0"), shape=SHAPE)
    cache.borrow(foreign, WANTED)
    assert not foreign.samples


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FingerprintCache(tmp_path / "file" / "cache")
    assert cache.find(KEY) is None
    with pytest.raises(StoreError, match="cannot be written"):
        cache.save(Record(key=KEY, shape=SHAPE))
