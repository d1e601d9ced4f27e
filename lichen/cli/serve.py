"""`lichen serve`: the daemon."""

from __future__ import annotations

import asyncio
import logging
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lichen.cli.settings import complete_model, config_of

if TYPE_CHECKING:
    from lichen.config import Config
    from lichen.runtime.resident import LoadProgress
    from lichen.runtime.served_model import ServedModel

Text = Optional[str]
Number = Optional[int]


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
    slots: Annotated[Number, typer.Option(help="Conversations answered at the same time.")] = None,
    threads: Annotated[Number, typer.Option(help="Threads that compute; 0: the physical cores.")] = None,
    queue: Annotated[Number, typer.Option(help="Requests that may wait for a slot.")] = None,
    keep_alive: Annotated[
        float | None, typer.Option(help="Seconds that an idle model stays loaded; -1: for ever.")
    ] = None,
    memory_limit: Annotated[Text, typer.Option(help="Most memory for all models, such as '4 GiB'.")] = None,
    max_models: Annotated[Number, typer.Option(help="Models loaded at once; 0: as memory allows.")] = None,
    max_body: Annotated[Text, typer.Option(help="Largest request body in bytes.")] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds to finish answers when stopping.")
    ] = None,
    log_level: Annotated[Text, typer.Option(help="debug, info, warning, error or critical.")] = None,
) -> None:
    """Serve models over an OpenAI-compatible HTTP API."""
    config = config_of(
        context,
        model=model,
        host=host,
        port=port,
        uds=uds,
        api_key=api_key,
        insecure_bind=allow_unauthenticated,
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
        allowed_origins=tuple(allowed_origin) if allowed_origin else None,
        context=context_tokens,
        slots=slots,
        threads=threads,
        queue=queue,
        keep_alive=keep_alive,
        memory_limit=memory_limit,
        max_models=max_models,
        max_body=max_body,
        drain_timeout=drain_timeout,
        log_level=log_level,
    )
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    run_daemon(config)


def run_daemon(config: Config) -> None:
    """Load in a thread while the HTTP server's modules are imported: both take about as long."""
    from lichen.runtime.heap import one_heap
    from lichen.runtime.resident import LoadProgress

    one_heap()  # before the first thread, so that what it loads can be given back whole
    loading: Future[Any] = Future()
    progress = LoadProgress()
    Thread(target=_load, args=(config, loading, progress), name="lichen-load", daemon=True).start()

    from lichen.runtime.http.daemon import DaemonOptions, serve
    from lichen.runtime.pool import ModelPool, PoolOptions
    from lichen.shelf import StoreShelf

    options = DaemonOptions(
        host=config.host,
        port=config.port,
        uds=config.uds,
        api_key=config.api_key,
        insecure_bind=config.insecure_bind,
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.allowed_origins,
        max_body=config.max_body,
        drain_timeout=config.drain_timeout,
    )

    pool_options = PoolOptions(
        keep_alive=config.keep_alive, memory_limit=config.memory_limit, max_models=config.max_models
    )

    async def run() -> None:
        pool = ModelPool(StoreShelf(config), pool_options)
        first = pool.start(asyncio.wrap_future(loading), progress)
        await serve(options, pool, first, on_event=lambda line: print(line, flush=True))

    try:
        import uvloop
    except ImportError:
        asyncio.run(run())
    else:
        uvloop.run(run())


def _load(config: Config, loading: Future[ServedModel], progress: LoadProgress) -> None:
    try:
        from lichen.api import load_model
        from lichen.cli.models import PullDisplay

        with PullDisplay(sys.stderr) as display:
            loading.set_result(asyncio.run(load_model(config, progress=display, loaded=progress)))
    except BaseException as error:  # raised again where the daemon waits for the model
        loading.set_exception(error)
