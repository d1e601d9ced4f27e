"""`python -m bench.raw_loop`: one HTTP client of lichen beside a bare `llama_decode` loop.

Both get the same file, threads and prompt tokens, and draw greedily. Runs alternate, each in a fresh process.
The loop keeps libgomp's own spinning, as a bare program would. Two numbers: decode tokens/s (from the second
token on, as the client's clock sees them) and the whole answer's time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.certificate import certificate, close_certificate, model_file, save
from bench.numbers import median
from bench.server import free_port
from lichen.devices.probe import probe

PROMPT = "The weather today is"  # its ids, not its text, are sent: both sides compute the same tokens
CONTEXT = 2048


def main() -> int:
    """Measure, print a table and one JSON line, write the result."""
    flags = argparse.ArgumentParser(
        prog="python -m bench.raw_loop", description="one client beside a bare loop"
    )
    flags.add_argument("--model", default="smollm2-135m")
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--threads", type=int, default=probe().physical_cores)
    flags.add_argument("--bare", type=int, metavar="TOKENS", help=argparse.SUPPRESS)  # the child's own call
    options = flags.parse_args()
    model = model_file(options.model)
    if options.bare is not None:
        print(json.dumps(bare_loop(model, options.threads, options.bare)))
        return 0
    record: dict[str, Any] = {"kind": "raw-loop", "status": "ok", "birth": certificate(model), "runs": []}
    print(f"{'tokens':>7} {'run':>4} {'bare loop':>10} {'one client':>11} {'ratio':>6}")
    for tokens in (64, 256):
        for run in range(1, options.runs + 1):
            pair = alternate(model, options.threads, tokens, bare_first=bool(run % 2))
            record["runs"].append({"tokens": tokens, "run": run, **pair})
            print(f"{tokens:>7} {run:>4} {pair['bare']['rate']:>10.1f} {pair['client']['rate']:>11.1f}"
                  f" {pair['client']['rate'] / pair['bare']['rate']:>6.3f}")  # fmt: skip
    close_certificate(record["birth"])
    record["ratios"] = {
        str(tokens): {
            "decode": median(
                r["client"]["rate"] / r["bare"]["rate"] for r in record["runs"] if r["tokens"] == tokens
            ),
            "whole": median(
                r["bare"]["seconds"] / r["client"]["seconds"] for r in record["runs"] if r["tokens"] == tokens
            ),
        }
        for tokens in (64, 256)
    }
    path = save(record)
    print(json.dumps({"bench": "raw_loop", "result": path.name, "ratios": record["ratios"]}))
    return 0


def alternate(model: Path, threads: int, tokens: int, *, bare_first: bool) -> dict[str, Any]:
    """One run of each, in the given order."""

    def bare() -> dict[str, float]:
        command = [sys.executable, "-m", "bench.raw_loop", "--model", str(model), "--threads", str(threads)]
        environment = {**os.environ, "GOMP_SPINCOUNT": "300000"}
        done = subprocess.run(
            [*command, "--bare", str(tokens)], env=environment, capture_output=True, text=True, check=True
        )
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def client() -> dict[str, float]:
        with daemon(model, threads) as port:
            one_client(port, model, 8)  # the first answer warms both sides up; the loop warms up too
            return one_client(port, model, tokens)

    first = bare() if bare_first else client()
    second = client() if bare_first else bare()
    return {"bare": first, "client": second} if bare_first else {"bare": second, "client": first}


def bare_loop(model: Path, threads: int, tokens: int) -> dict[str, float]:
    """Prefill and decode greedily with nothing around it."""
    from lichen.runtime.native import Context, ContextSize, Model, Sampler
    from lichen.runtime.sampling import sampler_options
    from lichen.runtime.sequence import SamplingOptions

    loaded = Model(model)
    context = Context(loaded, ContextSize(context=CONTEXT, slots=1, threads=threads, batch=256))
    sampler = Sampler(loaded, sampler_options(SamplingOptions(temperature=0)))
    prompt = loaded.tokenize(PROMPT, special=True, add_bos=True)
    started = first = 0.0
    for limit in (8, tokens):  # the first round is the warm-up
        context.clear(0)
        started = time.perf_counter()
        count = len(prompt)
        context.decode(prompt, list(range(count)), [0] * count, [*([0] * (count - 1)), 1])
        token = sampler.sample(context, count - 1)
        first = time.perf_counter()
        for position in range(count, count + limit - 1):
            context.decode([token], [position], [0], [1])
            token = sampler.sample(context, 0)
    ended = time.perf_counter()
    return {"rate": (tokens - 1) / (ended - first), "seconds": ended - started}


@contextmanager
def daemon(model: Path, threads: int) -> Iterator[int]:
    """A fresh `lichen serve`; its port."""
    port = free_port()
    command = [sys.executable, "-m", "lichen.cli", "serve", "--model", str(model), "--port", str(port)]
    command += ["--threads", str(threads), "--slots", "1", "--context", str(CONTEXT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "it was asked for"
        if not any(line.startswith("Ready") for line in process.stdout):
            raise SystemExit("lichen did not start")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def one_client(port: int, model: Path, tokens: int) -> dict[str, float]:
    """Stream one completion; the rate is of the chunks after the first."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first = last = 0.0
    timings: dict[str, Any] = {}
    while line := answer.readline():
        if line.startswith(b'data: {"id"'):
            last = time.perf_counter()
            first = first or last
            if b'"timings"' in line:
                timings = json.loads(line[6:])["timings"]
    connection.close()
    assert timings, "the answer is complete"
    return {"rate": (tokens - 1) / (last - first), "seconds": last - started}


if __name__ == "__main__":
    sys.exit(main())
