"""One scenario on one running server: the load, and what it comes to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.answer import Answer, AnswerError, read_answer
from bench.load import LoadResult, closed_loop
from bench.numbers import rounded, spread
from bench.peer import BenchError
from bench.scenarios import Prompts, Scenario, chat_request
from bench.server import MemoryWatch, ProcessorWatch, Server
from bench.stream import exchange

REQUEST_LIMIT_S = 240.0
WARM_UP = ("Say hello.", "Name a colour.")  # the first also pays for what a server does only once


async def warm_up(server: Server) -> None:
    """A few tokens before the clock counts. Raises BenchError when the server cannot answer."""
    port, extras = server.settings.port, server.peer.extras
    for text in WARM_UP:
        record = await exchange(port, chat_request(port, text, 8, extras), timeout=REQUEST_LIMIT_S)
        try:
            read_answer(record)
        except AnswerError as error:
            raise BenchError(f"{server.peer.title} cannot answer: {error}") from error


async def measure(
    server: Server, scenario: Scenario, prompts: Prompts, *, seed: int, model_bytes: int
) -> dict[str, Any]:
    """The scenario's numbers; failed requests are counted and named, and make the status "failed"."""
    port = server.settings.port

    def request(text: str) -> bytes:
        return chat_request(port, text, scenario.max_tokens, server.peer.extras)

    bodies = [[request(text) for text in own] for own in prompts.clients]
    errors: list[str] = []
    cold: Answer | None = None
    async with MemoryWatch(server.process.pid) as memory:
        if prompts.first is not None:
            record = await exchange(port, request(prompts.first), timeout=REQUEST_LIMIT_S)
            cold = _keep(record, errors)
        with ProcessorWatch(server.process.pid) as processor:
            result = await closed_loop(port, bodies, seed=seed, timeout=REQUEST_LIMIT_S)
    answers = [answer for own in result.clients for one in own if (answer := _keep(one, errors)) is not None]
    server.check_alive()
    return {
        "status": "failed" if errors or not answers else "ok",
        "errors": errors[:5],
        "failed_requests": len(errors),
        "server_cores": round(processor.server_cores, 3),
        "client_cores": round(processor.client_cores, 3),
        "foreign_cores": round(processor.foreign_cores, 3),
        "peak_rss_mb": round(memory.peak / 1e6, 1),
        **summarise(answers, result, scenario, model_bytes=model_bytes),
        **_prefix_reuse(cold, answers),
    }


def _keep(record: Any, errors: list[str]) -> Answer | None:
    try:
        return read_answer(record)
    except AnswerError as error:
        errors.append(str(error))
        return None


def summarise(
    answers: Sequence[Answer], result: LoadResult, scenario: Scenario, *, model_bytes: int
) -> dict[str, Any]:
    """Rates in tokens/s over the whole load, times in ms, and every request's numbers in short.

    bandwidth_gb_s: bytes of the model's file x decode steps a second of one client. Each step reads every
    weight once, so memory delivered at least this much; caches and the KV cache are not counted.
    """
    seconds = result.finished - result.started
    tokens = sum(answer.completion_tokens for answer in answers)
    gaps = [gap * 1e3 for answer in answers for gap in answer.gaps]
    rates = [rate for answer in answers if (rate := answer.decode_rate) is not None]
    decode = statistics.median(rates) if rates else None
    alone = scenario.clients == 1 and decode is not None
    return {
        "requests": len(answers),
        "seconds": round(seconds, 3),
        "completion_tokens": tokens,
        "tokens_counted_as_pieces": any(answer.counted for answer in answers),
        "prompt_tokens": spread([a.prompt_tokens for a in answers if a.prompt_tokens is not None], digits=0),
        "tokens_per_second": round(tokens / seconds, 3),
        "decode_tokens_per_second": rounded(decode, 3),
        "bandwidth_gb_s": rounded(decode * model_bytes / 1e9, 3) if alone and decode else None,
        "ttft_ms": spread([answer.ttft * 1e3 for answer in answers]),
        "gap_ms": spread(gaps),
        "total_ms": spread([answer.total * 1e3 for answer in answers]),
        "samples": {
            "ttft_ms": [round(answer.ttft * 1e3, 1) for answer in answers],
            "total_ms": [round(answer.total * 1e3, 1) for answer in answers],
            "tokens": [answer.completion_tokens for answer in answers],
        },
    }


def _prefix_reuse(cold: Answer | None, answers: Sequence[Answer]) -> dict[str, Any]:
    """Time to first token with the shared prefix cold and warm, and the share of one in the other."""
    if cold is None or not answers:
        return {}
    warm = statistics.median(answer.ttft for answer in answers)
    return {
        "cold_ttft_ms": round(cold.ttft * 1e3, 2),
        "warm_ttft_share": round(warm / cold.ttft, 4),
        "cached_tokens": spread([a.cached_tokens for a in answers if a.cached_tokens is not None], digits=0),
    }
