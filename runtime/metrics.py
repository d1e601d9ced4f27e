"""What the daemon counts, in Prometheus' text format 0.0.4.

METRICS declares every series; `render` reads the engines' counters at the moment of a scrape. Where vLLM
or llama-server have a name for a number, it goes by that name, so that dashboards made for them work.

Histograms are written by one engine thread and read by others without a lock: counts come from one copy
of the buckets, so they always agree with each other; a sum may lag by the observation of that moment.

Not covered: models that were unloaded. Their series end, and begin at 0 if they are loaded again, which
Prometheus takes for a restart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from lichen.runtime.speculation.drafter import MAX_DRAFT

if TYPE_CHECKING:
    from lichen.runtime.served_model import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ADAPTERS = 64  # names of adapters that have a series of their own, for each model
OTHERS = "*"  # no adapter can be called so

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_GAP = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_ANSWER = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metric(msgspec.Struct, frozen=True):
    """One declared series. buckets: upper bounds in seconds, of histograms only."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("model_name",)
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", help, labels or ("model_name",))


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", help, labels or ("model_name",))


def _seconds(name: str, help: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name, "histogram", help, buckets=buckets)


METRICS = (
    _gauge("vllm:num_requests_running", "Answers that are computed now."),
    _gauge("vllm:num_requests_waiting", "Requests that wait for a slot."),
    _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache that holds tokens, kept ones too; 1 is full."),
    _counter("vllm:prefix_cache_queries_total", "Prompt tokens that were looked up in the KV cache."),
    _counter("vllm:prefix_cache_hits_total", "Prompt tokens that were found in the KV cache."),
    _counter("vllm:prompt_tokens_total", "Prompt tokens, those found in the KV cache included."),
    _counter("vllm:generation_tokens_total", "Tokens drawn."),
    _counter(
        "vllm:request_success_total",
        "Ended requests, by reason: stop, length, abort (the client left), error.",
        "model_name",
        "finished_reason",
    ),
    _counter("vllm:spec_decode_num_drafts_total", "Drafts that were checked."),
    _counter("vllm:spec_decode_num_draft_tokens_total", "Tokens that were drafted."),
    _counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens that were right."),
    _counter(
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "Drafts whose token at this position, counted from 0, was right.",
        "model_name",
        "position",
    ),
    _seconds("vllm:time_to_first_token_seconds", "From submission to the first token.", _FIRST_TOKEN),
    _seconds("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_GAP),
    _seconds("vllm:e2e_request_latency_seconds", "From submission to the end of an answer.", _ANSWER),
    _counter("llamacpp:prompt_tokens_total", "Prompt tokens computed, those in the KV cache not included."),
    _counter("llamacpp:tokens_predicted_total", "Tokens drawn."),
    _gauge("llamacpp:requests_processing", "Answers that are computed now."),
    _gauge("llamacpp:requests_deferred", "Requests that wait for a slot."),
    _gauge("llamacpp:kv_cache_usage_ratio", "Share of the KV cache that holds tokens; 1 is full."),
    _gauge("llamacpp:kv_cache_tokens", "Tokens in the KV cache."),
    _counter("llamacpp:n_decode_total", "Steps of the engine, each one call of llama_decode."),
    _counter("lichen_requests_total", "Requests that the engine took."),
    _counter(
        "lichen_adapter_requests_total",
        f"Answers that were asked for, by adapter: empty for the model alone, * past {ADAPTERS} names.",
        "model_name",
        "adapter",
    ),
    _counter("lichen_requests_rejected_total", "Requests refused because the queue was full."),
    _gauge("lichen_slots", "Answers that can be computed at the same time."),
    _gauge("lichen_queue_limit", "Requests that may wait."),
    _gauge("lichen_adapter_bytes", "Memory of the adapters that are loaded."),
    _counter("lichen_adapter_switches_total", "Steps with another adapter than the step before."),
    _counter("lichen_model_loads_total", "Times that a model was loaded."),
    _counter("lichen_model_evictions_total", "Times that a model was unloaded to make room."),
    _counter("lichen_feedback_total", "Feedback that was taken, by rating: up, down, none.", "rating"),
    _counter("lichen_answers_kept_total", "Answers for the journal, by outcome: kept, failed.", "outcome"),
    Metric("lichen_journal_bytes", "gauge", "Bytes of the journal on disk.", ()),
    _gauge("lichen_jobs", "Jobs of learning, by status.", "status"),
    Metric("lichen_training_tokens_per_second", "gauge", "Speed of the training that runs.", ()),
    Metric("lichen_training_loss", "gauge", "Loss of its last step in nats a token.", ()),
    _counter("lichen_errors_total", "Error answers over HTTP, by their code.", "code"),
    Metric("lichen_resident_bytes", "gauge", "Memory of this process that is in RAM.", ()),
    _gauge("lichen_build_info", "Always 1; the labels say what runs.", "version", "llama_cpp"),
)
_BUCKETS = {metric.name: metric.buckets for metric in METRICS}


class Histogram:
    """Observations counted into fixed buckets; `bounds` are their upper ends, ascending and inclusive."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)  # the last one has no upper end

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` observations of the same value."""
        self._counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[int]:
        """Observations up to each bound, and at the end all of them."""
        seen = 0
        return [seen := seen + count for count in self._counts.copy()]


class EngineObserver(Protocol):
    """Who is told of an engine's answers, on its thread; must return within a microsecond or two."""

    def first_token(self, seconds: float) -> None:
        """An answer's first token came so long after its submission."""

    def token_gap(self, seconds: float) -> None:
        """A further token came so long after the one before it."""

    def checked(self, accepted: int) -> None:
        """Of a draft, the first `accepted` tokens were right."""

    def finished(self, reason: str, seconds: float) -> None:
        """An answer was complete so long after its submission."""


class EngineMetrics:
    """The observer whose histograms and counts `render` shows."""

    def __init__(self) -> None:
        self.to_first_token = Histogram(_BUCKETS["vllm:time_to_first_token_seconds"])
        self.between_tokens = Histogram(_BUCKETS["vllm:inter_token_latency_seconds"])
        self.whole_answer = Histogram(_BUCKETS["vllm:e2e_request_latency_seconds"])
        self.reasons = {"stop": 0, "length": 0}
        self.accepted_at = [0] * MAX_DRAFT  # drafts whose token at each position was right
        self.by_adapter: Tally[str] = Tally({"": 0})  # answers that were asked for, on the event loop
        self.first_token = self.to_first_token.observe
        self.token_gap = self.between_tokens.observe

    def asked(self, adapter: str, answers: int) -> None:
        """The engine took a request; adapter: its name, empty for none."""
        known = adapter in self.by_adapter or len(self.by_adapter) <= ADAPTERS
        self.by_adapter[adapter if known else OTHERS] += answers

    def checked(self, accepted: int) -> None:
        """Count a draft by the positions that were right."""
        for position in range(accepted):
            self.accepted_at[position] += 1

    def finished(self, reason: str, seconds: float) -> None:
        """Count an answer that was complete `seconds` after its submission."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.whole_answer.observe(seconds)


class ProcessMetrics:
    """What is counted for the whole process, on the event loop."""

    def __init__(self) -> None:
        self.loads: Tally[str] = Tally()  # by model
        self.evictions: Tally[str] = Tally()
        self.errors: Tally[str] = Tally()  # by code
        self.feedback: Tally[str] = Tally(up=0, down=0, none=0)  # by rating
        self.kept: Tally[str] = Tally(kept=0, failed=0)  # by outcome

    def loaded(self, model: str) -> None:
        """A model is ready."""
        self.loads[model] += 1

    def evicted(self, model: str) -> None:
        """A model was unloaded to make room."""
        self.evictions[model] += 1

    def failed(self, code: str) -> None:
        """A request got an error answer."""
        self.errors[code] += 1


Value = float | Histogram
Series = Iterator[tuple[str, tuple[str, ...], Value]]  # name, values of its labels, value


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is read for the whole process at a scrape: its bytes in RAM and in the journal, which versions
    run, jobs by status, and of the training that runs tokens a second and loss."""

    resident: int
    version: str
    llama_cpp: str
    journal: int = 0
    jobs: dict[str, int] = {}
    training: tuple[float, float] | None = None


def render(models: Iterable[ServedModel], process: ProcessMetrics, facts: ProcessFacts) -> str:
    """Everything, as Prometheus reads it."""
    found: dict[str, list[tuple[tuple[str, ...], Value]]] = {metric.name: [] for metric in METRICS}
    for model in models:
        for name, labels, value in _of_model(model):
            found[name].append((labels, value))
    for name, labels, value in _of_process(process, facts):
        found[name].append((labels, value))
    lines: list[str] = []
    for metric in METRICS:
        if found[metric.name]:
            lines += [f"# HELP {metric.name} {_escaped(metric.help)}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, value in found[metric.name]:
            lines += _samples(metric, dict(zip(metric.labels, labels, strict=True)), value)
    return "\n".join([*lines, ""])


def _of_model(model: ServedModel) -> Series:
    now = model.engine.counters()
    seen = model.metrics
    name = (model.info.name,)
    used = now.cells_used / max(1, model.info.context * model.info.slots)
    values: dict[str, Value] = {
        "vllm:num_requests_running": now.running,
        "vllm:num_requests_waiting": now.waiting,
        "vllm:kv_cache_usage_perc": used,
        "vllm:prefix_cache_queries_total": now.prompt_tokens,
        "vllm:prefix_cache_hits_total": now.cached_tokens,
        "vllm:prompt_tokens_total": now.prompt_tokens,
        "vllm:generation_tokens_total": now.completion_tokens,
        "vllm:time_to_first_token_seconds": seen.to_first_token,
        "vllm:inter_token_latency_seconds": seen.between_tokens,
        "vllm:e2e_request_latency_seconds": seen.whole_answer,
        "vllm:spec_decode_num_drafts_total": now.drafts,
        "vllm:spec_decode_num_draft_tokens_total": now.draft_tokens,
        "vllm:spec_decode_num_accepted_tokens_total": now.draft_accepted,
        "llamacpp:prompt_tokens_total": max(0, now.prompt_tokens - now.cached_tokens),
        "llamacpp:tokens_predicted_total": now.completion_tokens,
        "llamacpp:requests_processing": now.running,
        "llamacpp:requests_deferred": now.waiting,
        "llamacpp:kv_cache_usage_ratio": used,
        "llamacpp:kv_cache_tokens": now.cells_used,
        "llamacpp:n_decode_total": now.steps,
        "lichen_requests_total": now.requests,
        "lichen_requests_rejected_total": now.rejected,
        "lichen_slots": model.info.slots,
        "lichen_queue_limit": model.options.queue,
        "lichen_adapter_bytes": sum(one.bytes for one in model.adapters.status()),
        "lichen_adapter_switches_total": now.adapter_switches,
    }
    yield from ((metric, name, value) for metric, value in values.items())
    for reason, count in {**seen.reasons, "abort": now.cancelled, "error": now.failed}.items():
        yield "vllm:request_success_total", (*name, reason), count
    for adapter, count in seen.by_adapter.copy().items():
        yield "lichen_adapter_requests_total", (*name, adapter), count
    for position, count in enumerate(seen.accepted_at):
        yield "vllm:spec_decode_num_accepted_tokens_per_pos_total", (*name, str(position)), count


def _of_process(process: ProcessMetrics, facts: ProcessFacts) -> Series:
    tallies = {
        "lichen_model_loads_total": process.loads,
        "lichen_model_evictions_total": process.evictions,
        "lichen_errors_total": process.errors,
        "lichen_feedback_total": process.feedback,
        "lichen_answers_kept_total": process.kept,
    }
    for name, tally in tallies.items():
        yield from ((name, (label,), count) for label, count in tally.items())
    yield "lichen_resident_bytes", (), facts.resident
    yield "lichen_journal_bytes", (), facts.journal
    yield from (("lichen_jobs", (status,), count) for status, count in facts.jobs.items())
    if facts.training is not None:
        speed, loss = facts.training
        yield "lichen_training_tokens_per_second", (), speed
        yield "lichen_training_loss", (), loss
    yield "lichen_build_info", (facts.version, facts.llama_cpp), 1


def _samples(metric: Metric, labels: Mapping[str, str], value: Value) -> list[str]:
    if not isinstance(value, Histogram):
        return [_line(metric.name, labels, value)]
    counts, ends = value.cumulative(), [*(repr(bound) for bound in value.bounds), "+Inf"]
    return [
        *(
            _line(f"{metric.name}_bucket", {**labels, "le": end}, count)
            for end, count in zip(ends, counts, strict=True)
        ),
        _line(f"{metric.name}_sum", labels, value.total),
        _line(f"{metric.name}_count", labels, counts[-1]),
    ]


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{label}="{_quoted(text)}"' for label, text in labels.items())
    return f"{name}{{{pairs}}} {value!r}" if pairs else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")
