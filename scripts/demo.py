"""The demonstration behind `make demo`: pull, serve, one streamed answer over HTTP, stop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import httpx

MODEL = "smollm2-135m"
QUESTION = "Explain in two sentences why the sky is blue."
LICHEN = [sys.executable, "-m", "lichen.cli"]
NEXT = """
Try next:
  .venv/bin/lichen chat                  talk to it in the terminal
  .venv/bin/lichen serve                 the daemon; any OpenAI client works at http://127.0.0.1:8642/v1
  .venv/bin/lichen doctor                what this machine can do
"""


def main() -> None:
    """Run the demonstration; a failure is one sentence and exit code 1."""
    if subprocess.run([*LICHEN, "pull", MODEL], stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    daemon = subprocess.Popen(
        [*LICHEN, "serve", "--model", MODEL, "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            wait_ready(client, daemon)
            answer(client)
    except httpx.HTTPError as error:
        sys.exit(f"lichen: the demonstration failed: {error}")
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    print(NEXT, end="")


def wait_ready(client: httpx.Client, daemon: subprocess.Popen[bytes]) -> None:
    """Wait for `/health`, or say that the daemon ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            sys.exit("lichen: the daemon ended before it was ready; its words are above.")
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    sys.exit("lichen: the daemon was not ready within 60 s.")


def answer(client: httpx.Client) -> None:
    """Stream one chat answer to the terminal, and close with its numbers."""
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    print(f"\n{MODEL} > {QUESTION}\n")
    usage: dict[str, int] = {}
    timings: dict[str, float] = {}
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage, timings = event.get("usage") or usage, event.get("timings") or timings
            for choice in event["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
    print(
        f"\n\n{usage['completion_tokens']} tokens, {timings['tokens_per_second']:.0f} tokens/s, "
        f"first token after {timings['ttft_ms']:.0f} ms"
    )


if __name__ == "__main__":
    main()
