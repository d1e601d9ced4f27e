"""Who answers: a running daemon, or the engine in this process. Both give text pieces and a result."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from lichen.errors import ConfigError, EngineError, LichenError, Unauthorized, Unavailable

if TYPE_CHECKING:
    import ssl

    import httpx

    from lichen.api import Runtime
    from lichen.config import Config

Message = dict[str, str]


class Answering(Protocol):
    """Something that answers conversations. `result` holds the last answer's numbers; `drafted` says whether
    the last piece had been guessed, where options say `show_drafts`."""

    label: str
    result: dict[str, Any]
    drafted: bool

    def stream(self, messages: list[Message], options: dict[str, Any]) -> AsyncIterator[str]:
        """Text pieces of the answer; closing the iterator stops it."""
        ...


class DaemonAnswering:
    """A daemon over HTTP or its Unix socket. model: which of its models; None for its default one."""

    def __init__(self, client: httpx.AsyncClient, label: str, model: str | None) -> None:
        self._client = client
        self._model = model
        self.label = label
        self.result: dict[str, Any] = {}
        self.drafted = False

    async def stream(self, messages: list[Message], options: dict[str, Any]) -> AsyncIterator[str]:
        """Read the server-sent events of one chat completion. Raises Unavailable if they break off."""
        import httpx

        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **options}
        if self._model is not None:
            body["model"] = self._model
        self.result = {}
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise refusal(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    if line.startswith("data: [DONE]"):
                        return
                    if line.startswith("data: "):
                        for text in self._read_event(line[6:]):
                            yield text
        except httpx.HTTPError as error:
            raise Unavailable("The connection to the daemon broke before the answer was complete.") from error
        raise Unavailable("The daemon ended its answer before it was complete.")

    def _read_event(self, data: str) -> list[str]:
        """The texts of one event; its numbers go into `result`."""
        try:
            event = json.loads(data)
            if "error" in event:
                raise EngineError(str(event["error"]["message"]))
            self.drafted = bool(event.get("lichen", {}).get("drafted"))
            self.result |= {name: event[name] for name in ("usage", "timings", "model") if event.get(name)}
            for choice in event["choices"]:
                if choice["finish_reason"]:
                    self.result["finish_reason"] = choice["finish_reason"]
            return [text for choice in event["choices"] if (text := choice["delta"].get("content"))]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unavailable("The daemon sent an event that is not an answer of lichen.") from error


class EmbeddedAnswering:
    """The engine in this process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.label = f"{runtime.served.info.name} in this process"
        self.result: dict[str, Any] = {}
        self.drafted = False

    async def stream(self, messages: list[Message], options: dict[str, Any]) -> AsyncIterator[str]:
        """Pieces of one chat answer."""
        self.result = {}
        shown = options.get("show_drafts", False)
        plain = {name: value for name, value in options.items() if name != "show_drafts"}
        stream = self._runtime.chat(messages, **plain)
        try:
            async for piece in stream:
                self.drafted = shown and stream.drafted
                yield piece
        finally:
            await stream.aclose()
        done = stream.completion
        if done is not None:
            usage, timings = done.usage, done.timings
            self.result = {
                "model": self._runtime.served.info.name,
                "finish_reason": done.finish_reason,
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                },
                "timings": {
                    "ttft_ms": round(timings.ttft_s * 1e3, 1),
                    "tokens_per_second": round(timings.tokens_per_second, 2),
                    "draft_n": timings.draft_n,
                    "draft_n_accepted": timings.draft_n_accepted,
                },
            }


@asynccontextmanager
async def answering(config: Config, *, model_given: bool, use_daemon: bool) -> AsyncIterator[Answering]:
    """The daemon if one runs and has the wanted model, loaded or not; else the engine in this process."""
    if use_daemon:
        async with daemon_client(config) as client:
            names = await _served_names(client)
            wanted = config.model if model_given else None
            if names and (wanted is None or wanted in names):
                label = f"{wanted or names[0]} from the daemon at {_address(config)}"
                yield DaemonAnswering(client, label, wanted)
                return
    import sys

    import lichen
    from lichen.cli.models import PullDisplay
    from lichen.config import override

    with PullDisplay(sys.stderr) as display:
        runtime = lichen.Runtime(config=override(config, {"slots": 1}), progress=display)
        await runtime.open()
    try:
        yield EmbeddedAnswering(runtime)
    finally:
        await runtime.close()


@asynccontextmanager
async def daemon_client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client for the configured daemon."""
    import httpx

    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    transport = httpx.AsyncHTTPTransport(uds=str(config.uds)) if config.uds else None
    tls = config.tls_cert is not None and config.uds is None
    base = "http://localhost" if config.uds else f"{'https' if tls else 'http'}://{_address(config)}"
    async with httpx.AsyncClient(
        base_url=base,
        headers=headers,
        transport=transport,
        verify=_trust(config) if tls else True,
        timeout=httpx.Timeout(None, connect=2),
        trust_env=False,
    ) as client:
        yield client


def _trust(config: Config) -> ssl.SSLContext:
    """Trust in the daemon's own certificate and nothing else. Raises ConfigError when it cannot be read.

    Within this machine its names do not matter: few certificates name 127.0.0.1.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = config.host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be its own authority
    try:
        context.load_verify_locations(config.tls_cert)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{config.tls_cert} of the setting tls_cert is not a certificate in PEM form."
        ) from error
    return context


def _address(config: Config) -> str:
    if config.uds:
        return str(config.uds)
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{host}:{config.port}"


async def _served_names(client: httpx.AsyncClient) -> list[str]:
    """The models of a daemon that answers now, its default one first; none where there is no daemon."""
    import httpx

    try:
        if (await client.get("/health", timeout=1)).status_code != 200:
            return []
        answer = await client.get("/v1/models", timeout=2)
        if answer.status_code == 401:
            raise refusal(answer.status_code, answer.content)
        return [str(card["id"]) for card in answer.json()["data"]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return []


def refusal(status: int, body: bytes) -> LichenError:
    """The daemon's own sentence about a request that it refused."""
    if status == 401:
        return Unauthorized("The daemon needs another API key.", hint="Set LICHEN_API_KEY.")
    try:
        return LichenError(str(json.loads(body)["error"]["message"]))
    except (ValueError, LookupError, TypeError):
        return LichenError(f"The daemon answered with status {status}.")
