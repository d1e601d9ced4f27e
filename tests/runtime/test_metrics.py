"""The text that Prometheus reads, judged by Prometheus' own parser, and what it costs to count."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lichen.runtime.counters import Counters
from lichen.runtime.metrics import (
    ADAPTERS,
    METRICS,
    EngineMetrics,
    Histogram,
    ProcessFacts,
    ProcessMetrics,
    render,
)
from lichen.runtime.sequence import SamplingOptions
from lichen.runtime.served_model import ServedModel
from tests.conftest import RunningDaemon

FACTS = ProcessFacts(
    resident=1 << 20, version="1.0", llama_cpp="2.0", jobs={"running": 1}, training=(100.0, 2.0)
)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """(name, labels) -> value of every sample."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def stand_in(name: str = "moss", **counters: int) -> Any:
    """A model that has only what is read from one."""
    return SimpleNamespace(
        info=SimpleNamespace(name=name, context=100, slots=2),
        options=SimpleNamespace(queue=7),
        engine=SimpleNamespace(counters=lambda: Counters(**counters)),
        metrics=EngineMetrics(),
        adapters=SimpleNamespace(status=lambda: [SimpleNamespace(bytes=5)]),
    )


@given(st.lists(st.floats(0, 1e4), max_size=60))
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    for one in values:
        histogram.observe(one)
    expected = [sum(one <= bound for one in values) for bound in (0.1, 1.0, 10.0, math.inf)]
    assert histogram.cumulative() == expected
    assert math.isclose(histogram.total, sum(values), abs_tol=1e-9)


def test_several_equal_observations_are_counted_at_once() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.5, count=3)
    assert (histogram.cumulative(), histogram.total) == ([3, 3], 1.5)


def test_every_declared_series_is_given_with_its_type() -> None:
    process = ProcessMetrics()
    process.loaded("moss")
    process.evicted("moss")
    process.failed("not_found")
    text = render([stand_in()], process, FACTS)
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    assert types == {metric.name: metric.kind for metric in METRICS}
    # A counter's family goes by the name without _total in the parser.
    families = {family.name for family in text_string_to_metric_families(text)}
    assert families == {
        metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name for metric in METRICS
    }


def test_names_follow_prometheus_rules() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_counters_are_told_under_the_names_of_each_dashboard() -> None:
    model = stand_in(prompt_tokens=50, cached_tokens=20, completion_tokens=9, cells_used=50, running=1)
    samples = read(render([model, stand_in("fern")], ProcessMetrics(), FACTS))
    assert value(samples, "vllm:prompt_tokens_total", model_name="moss") == 50
    assert value(samples, "vllm:prefix_cache_hits_total", model_name="moss") == 20
    assert value(samples, "llamacpp:prompt_tokens_total", model_name="moss") == 30
    assert value(samples, "vllm:kv_cache_usage_perc", model_name="moss") == 0.25
    assert value(samples, "vllm:generation_tokens_total", model_name="fern") == 0
    assert value(samples, "lichen_resident_bytes") == 1 << 20
    assert value(samples, "lichen_build_info", version="1.0", llama_cpp="2.0") == 1


def test_requests_are_told_by_adapter_and_any_number_of_names_stays_bounded() -> None:
    model = stand_in()
    for adapter, answers in (("", 3), ("intents", 2), ("intents", 1)):
        model.metrics.asked(adapter, answers)
    for number in range(2 * ADAPTERS):
        model.metrics.asked(f"a{number}", 1)
    model.metrics.asked("intents", 1)
    told = {
        dict(labels)["adapter"]: count
        for (name, labels), count in read(render([model], ProcessMetrics(), FACTS)).items()
        if name == "lichen_adapter_requests_total"
    }
    assert (told[""], told["intents"], told["a0"]) == (3, 4, 1)
    assert len(told) == ADAPTERS + 2 and told["*"] == ADAPTERS + 1
    assert sum(told.values()) == 7 + 2 * ADAPTERS


@given(st.text(max_size=30).filter(lambda text: "\r" not in text))
def test_a_model_may_have_any_name(name: str) -> None:
    samples = read(render([stand_in(name)], ProcessMetrics(), FACTS))
    assert value(samples, "lichen_slots", model_name=name) == 2


def test_without_a_model_the_process_is_still_told() -> None:
    samples = read(render([], ProcessMetrics(), FACTS))
    assert {name for name, _ in samples} == {
        "lichen_resident_bytes",
        "lichen_build_info",
        "lichen_feedback_total",
        "lichen_answers_kept_total",
        "lichen_journal_bytes",
        "lichen_jobs",
        "lichen_training_tokens_per_second",
        "lichen_training_loss",
    }


async def test_the_engine_tells_its_observer_of_every_token(served: ServedModel) -> None:
    before = served.metrics
    counts = {name: getattr(before, name).cumulative()[-1] for name in ("to_first_token", "between_tokens")}
    ended = dict(before.reasons)
    options = SamplingOptions(max_tokens=6, temperature=0)
    (made,) = await served.complete("1, 2, 3, 4,", options)
    await made.text()
    assert made.finished is not None
    drawn = made.finished.usage.completion_tokens
    assert before.to_first_token.cumulative()[-1] == counts["to_first_token"] + 1
    assert before.between_tokens.cumulative()[-1] == counts["between_tokens"] + drawn - 1
    reason = made.finished.reason
    assert before.reasons == {**ended, reason: ended[reason] + 1}


async def test_the_times_are_those_of_the_answer(served: ServedModel) -> None:
    served.metrics = served.engine.observer = EngineMetrics()
    (made,) = await served.complete("Once upon a time", SamplingOptions(max_tokens=8, temperature=0, seed=1))
    await made.text()
    assert made.finished is not None
    timings, metrics = made.finished.timings, served.metrics
    assert math.isclose(metrics.to_first_token.total, timings.ttft_s, abs_tol=1e-3)
    assert math.isclose(metrics.between_tokens.total, timings.decode_s, abs_tol=0.05)
    assert metrics.whole_answer.total >= metrics.to_first_token.total + metrics.between_tokens.total


def test_telling_of_a_token_takes_less_than_two_microseconds() -> None:
    observe, rounds = EngineMetrics().token_gap, 20_000
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(rounds):
            observe(0.03)
        best = min(best, (time.perf_counter() - started) / rounds)
    assert best < 2e-6


def test_the_daemon_answers_a_scrape(daemon: RunningDaemon) -> None:
    before = read(httpx.get(f"{daemon.url}/metrics").text)
    body = {"prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 6}
    model = httpx.post(f"{daemon.base_url}/completions", json=body, timeout=30).json()["model"]
    httpx.get(f"{daemon.base_url}/models/none")
    httpx.get(f"{daemon.url}/metrics", headers={"Host": "evil.example"})
    answer = httpx.get(f"{daemon.url}/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    after = read(answer.text)

    def rise(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0)

    assert rise("vllm:generation_tokens_total", model_name=model) == 6
    assert rise("vllm:inter_token_latency_seconds_count", model_name=model) == 5
    assert rise("vllm:time_to_first_token_seconds_count", model_name=model) == 1
    assert rise("vllm:request_success_total", model_name=model, finished_reason="length") == 1
    assert rise("lichen_errors_total", code="not_found") == 1
    assert rise("lichen_errors_total", code="forbidden") == 1
    assert value(after, "lichen_model_loads_total", model_name=model) == 1
    assert value(after, "lichen_resident_bytes") > 10 << 20


async def test_a_client_that_leaves_is_an_abort(daemon: RunningDaemon) -> None:
    def aborts() -> float:
        samples = read(httpx.get(f"{daemon.url}/metrics").text)
        return value(samples, "vllm:request_success_total", model_name=daemon.model, finished_reason="abort")

    before = aborts()
    body = {"prompt": "Count: 1, 2, 3,", "max_tokens": 600, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{daemon.base_url}/completions", json=body, timeout=60) as running:
        next(running.iter_lines())
    await asyncio.to_thread(daemon.wait_idle)
    assert aborts() == before + 1


def test_no_client_of_prometheus_is_imported() -> None:
    code = "import sys, lichen.runtime.http.daemon; print('prometheus_client' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
