"""`lichen serve`: the daemon."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lichen.cli.settings import Given, complete_model
from lichen.runtime.http.log_format import configure_logging

if TYPE_CHECKING:
    from lichen.config import Config, Effective
    from lichen.planning import Planned
    from lichen.replanning import Say
    from lichen.runtime.http.daemon import DaemonOptions
    from lichen.runtime.initiative import Options as InitiativeOptions
    from lichen.runtime.pool import ModelPool
    from lichen.runtime.resident import LoadProgress
    from lichen.runtime.served_model import ServedModel
    from lichen.shelf import StoreShelf

Text = Optional[str]
Number = Optional[int]
Decimal = Optional[float]
# Options whose names on the command line read better than those of their settings.
RENAMED = {
    "allow_unauthenticated": "insecure_bind",
    "allowed_host": "allowed_hosts",
    "allowed_origin": "allowed_origins",
    "context_tokens": "context",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    context: typer.Context,
    model: Annotated[Text, typer.Option(help="Model to serve.", autocompletion=complete_model)] = None,
    host: Annotated[Text, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[Number, typer.Option(help="TCP port; 0 takes a free one.")] = None,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead.")] = None,
    api_key: Annotated[Text, typer.Option(help="Key that clients must send.")] = None,
    allow_unauthenticated: Annotated[
        bool | None, typer.Option("--allow-unauthenticated", help="Listen beyond this machine without a key.")
    ] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Also answer to this Host name.")] = None,
    allowed_origin: Annotated[list[str] | None, typer.Option(help="Let pages of this origin call.")] = None,
    context_tokens: Annotated[
        Number,
        typer.Option("--context", help="Tokens of one conversation; 0: what the model was trained for."),
    ] = None,
    intent: Annotated[
        Text, typer.Option(help="Plan for latency, throughput, memory, battery or balanced.")
    ] = None,
    objectives: Annotated[
        Text, typer.Option(help="What the plan must keep, such as 'ttft=300ms, users=8'.")
    ] = None,
    batch: Annotated[Number, typer.Option(help="Tokens of one step of the engine.")] = None,
    chunk: Annotated[Number, typer.Option(help="Tokens of a prompt between two of an answer.")] = None,
    kv_type: Annotated[Text, typer.Option(help="Keys and values of the context as f16 or q8_0.")] = None,
    slots: Annotated[Number, typer.Option(help="Conversations answered at the same time.")] = None,
    threads: Annotated[Number, typer.Option(help="Threads that compute; 0: the physical cores.")] = None,
    queue: Annotated[Number, typer.Option(help="Requests that may wait for a slot.")] = None,
    prefix_cache: Annotated[Text, typer.Option(help="Bytes on disk for long prompts; 0 for none.")] = None,
    speculation: Annotated[Text, typer.Option(help="How to draft: auto, off, suffix, model or head.")] = None,
    draft_model: Annotated[
        Text, typer.Option(help="Smaller model that drafts.", autocompletion=complete_model)
    ] = None,
    draft_head: Annotated[Text, typer.Option(help="Draft head to begin with.")] = None,
    distil_memory: Annotated[
        Text, typer.Option(help="Bytes on disk for what a draft head learns from; 0 learns nothing.")
    ] = None,
    answer_memory: Annotated[Text, typer.Option(help="Bytes on disk for past answers; 0 for none.")] = None,
    adapter_memory: Annotated[Text, typer.Option(help="Bytes of memory for a model's adapters.")] = None,
    keep_alive: Annotated[
        float | None, typer.Option(help="Seconds that an idle model stays loaded; -1: for ever.")
    ] = None,
    memory_limit: Annotated[Text, typer.Option(help="Most memory for all models, such as '4 GiB'.")] = None,
    max_models: Annotated[Number, typer.Option(help="Models loaded at once; 0: as memory allows.")] = None,
    max_body: Annotated[Text, typer.Option(help="Largest request body in bytes.")] = None,
    rate_limit: Annotated[Number, typer.Option(help="Requests a minute and client; 0: no limit.")] = None,
    request_timeout: Annotated[Decimal, typer.Option(help="Seconds for an answer; 0: no limit.")] = None,
    read_timeout: Annotated[Decimal, typer.Option(help="Seconds for headers, and for a body.")] = None,
    write_timeout: Annotated[Decimal, typer.Option(help="Seconds that a client may not read.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM): speak HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate (PEM).")] = None,
    drain_timeout: Annotated[Decimal, typer.Option(help="Seconds to finish answers when stopping.")] = None,
    journal: Annotated[Text, typer.Option(help="Answers to keep for learning: off, ask or all.")] = None,
    journal_limit: Annotated[Text, typer.Option(help="Bytes on disk for kept answers.")] = None,
    files_limit: Annotated[Text, typer.Option(help="Bytes on disk for uploaded files.")] = None,
    adapters_limit: Annotated[Text, typer.Option(help="Bytes on disk for versions of adapters.")] = None,
    auto_rollback: Annotated[bool | None, typer.Option(help="Undo a version that does worse.")] = None,
    auto_learn: Annotated[bool | None, typer.Option("--auto-learn", help="Learn from feedback.")] = None,
    auto_learn_after: Annotated[Number, typer.Option(help="New lessons before it does.")] = None,
    auto_learn_idle: Annotated[Decimal, typer.Option(help="Minutes without a request before.")] = None,
    auto_learn_minutes: Annotated[Decimal, typer.Option(help="About how long it may train.")] = None,
    auto_learn_memory: Annotated[Text, typer.Option(help="Bytes of memory that it may take.")] = None,
    auto_learn_disk: Annotated[Text, typer.Option(help="Bytes on disk that it may take.")] = None,
    auto_learn_hours: Annotated[Text, typer.Option(help="When it may begin: HH:MM-HH:MM, local.")] = None,
    auto_learn_battery: Annotated[bool | None, typer.Option(help="Also while unplugged.")] = None,
    log_level: Annotated[Text, typer.Option(help="debug, info, warning, error or critical.")] = None,
    log_format: Annotated[Text, typer.Option(help="text or json.")] = None,
) -> None:
    """Serve models over an OpenAI-compatible HTTP API."""
    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    flags: Given = context.obj
    effective = flags.effective(**{RENAMED.get(name, name): value for name, value in given.items()})
    configure_logging(effective.config.log_level, effective.config.log_format)
    run_daemon(effective)


def run_daemon(effective: Effective) -> None:
    """Load in a thread while the HTTP server's modules are imported: both take about as long."""
    from lichen.runtime.heap import one_heap
    from lichen.runtime.resident import LoadProgress

    one_heap()  # before the first thread, so that what it loads can be given back whole
    planned = _plan(effective)
    config = planned.config if planned else effective.config
    loading: Future[Any] = Future()
    progress = LoadProgress()
    Thread(target=_load, args=(config, planned, loading, progress), name="lichen-load", daemon=True).start()

    from lichen.cli.fleet_daemon import updating
    from lichen.runtime.http.daemon import serve
    from lichen.runtime.pool import ModelPool, PoolOptions
    from lichen.shelf import StoreShelf
    from lichen.sync.store import Store

    pool_options = PoolOptions(
        keep_alive=config.keep_alive, memory_limit=config.memory_limit, max_models=config.max_models
    )

    def say(line: str) -> None:
        print(line, flush=True)

    async def run() -> None:
        shelf = StoreShelf(config)
        pool = ModelPool(shelf, pool_options)
        store = Store(config.home / "store", offline=config.offline)
        first = pool.start(asyncio.wrap_future(loading), progress)
        async with _upkeep(planned, shelf, pool, first, say), updating(config, pool):
            await serve(_daemon_options(config), pool, first, store=store, on_event=say)

    try:
        import uvloop
    except ImportError:
        asyncio.run(run())
    else:
        uvloop.run(run())


def _daemon_options(config: Config) -> DaemonOptions:
    from lichen.adapters.gate import Limits
    from lichen.runtime.http.daemon import DaemonOptions

    return DaemonOptions(
        host=config.host,
        port=config.port,
        uds=config.uds,
        api_key=config.api_key,
        insecure_bind=config.insecure_bind,
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
        keys_file=config.home / "keys.json",
        rate_limit=config.rate_limit,
        request_timeout=config.request_timeout,
        read_timeout=config.read_timeout,
        write_timeout=config.write_timeout,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        max_body=config.max_body,
        drain_timeout=config.drain_timeout,
        journal=config.journal,
        learning_folder=config.home / "learning",
        journal_limit=config.journal_limit,
        files_limit=config.files_limit,
        adapters_folder=config.home / "adapters",
        initiative=_initiative(config),
        auto_rollback=config.auto_rollback,
        gate=Limits(gain=config.gate_gain, general=config.gate_general, earlier=config.gate_earlier),
    )


@asynccontextmanager
async def _upkeep(
    planned: Planned | None, shelf: StoreShelf, pool: ModelPool, first: Awaitable[None], say: Say
) -> AsyncIterator[None]:
    """Keep the daemon on its plan meanwhile, where it has one."""
    if planned is None:
        yield
        return
    from lichen.replanning import Replanning

    upkeep = asyncio.create_task(Replanning(planned, shelf, say).keep(pool, first))
    try:
        yield
    finally:
        upkeep.cancel()
        await asyncio.wait({upkeep})


def _plan(effective: Effective) -> Planned | None:
    """Measure what is not known of the model, and plan for the intent if there is one.

    Told on standard error. Raises ConfigError for objectives that cannot be kept, or without an intent.
    """
    if effective.config.intent is None and effective.config.objectives is None:
        return None
    from lichen.api import find_model
    from lichen.cli.models import PullDisplay
    from lichen.cli.plan import teller
    from lichen.cli.texts import Stages
    from lichen.planning import given_settings, plan_for, refuse_without_intent, wish_of

    config = effective.config
    refuse_without_intent(config)
    wanted = wish_of(config)  # refused before anything is pulled or measured
    with PullDisplay(sys.stderr) as display:
        asked = asyncio.run(find_model(config, progress=display))
    with Stages() as stages:
        planned = plan_for(config, asked, wanted, given=given_settings(effective), tell=teller(stages))
    for reason in planned.reasons:
        print(reason, file=sys.stderr, flush=True)
    return planned


def _initiative(config: Config) -> InitiativeOptions:
    from lichen.adapters.policy import Rules, hours_of
    from lichen.runtime.initiative import Options

    if not config.auto_learn:
        return Options()
    rules = Rules(
        after=config.auto_learn_after,
        idle=60 * config.auto_learn_idle,
        memory=config.auto_learn_memory,
        disk=config.auto_learn_disk,
        hours=None if config.auto_learn_hours is None else hours_of(config.auto_learn_hours),
        on_battery=config.auto_learn_battery,
    )
    return Options(rules=rules, minutes=config.auto_learn_minutes)


def _load(
    config: Config, planned: Planned | None, loading: Future[ServedModel], progress: LoadProgress
) -> None:
    try:
        from lichen.api import load_model
        from lichen.cli.models import PullDisplay
        from lichen.planning import Asked

        asked = None
        if planned is not None:
            asked = Asked(name=planned.asked.name, path=planned.path, sha256=planned.sha256)
        with PullDisplay(sys.stderr) as display:
            model = asyncio.run(load_model(config, progress=display, loaded=progress, asked=asked))
        loading.set_result(model)
    except BaseException as error:  # raised again where the daemon waits for the model
        loading.set_exception(error)
