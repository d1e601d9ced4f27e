"""The command line: one thin layer of typer and rich over the library and the daemon."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer

import lichen
from lichen.cli import (
    adapters,
    answer,
    collect,
    distil,
    doctor,
    evaluate,
    feedback,
    fingerprint,
    fleet,
    fleet_device,
    inspect,
    jobs,
    keys,
    learn,
    mixture,
    models,
    plan,
    quantize,
    rollouts,
    serve,
    top,
)
from lichen.cli.settings import Given
from lichen.errors import ConfigError, LichenError

app = typer.Typer(
    name="lichen",
    help="Private language models on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    answer,
    serve,
    models,
    quantize,
    evaluate,
    fingerprint,
    plan,
    keys,
    feedback,
    learn,
    distil,
    jobs,
    adapters,
    rollouts,
    collect,
    fleet,
    fleet_device,
    mixture,
    inspect,
    doctor,
    top,
):
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lichen {lichen.__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never use the network to fetch anything.")
    ] = False,
    home: Annotated[
        str | None, typer.Option("--home", metavar="PATH", help="Folder for models and state.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that go before any command."""
    context.obj = Given({"offline": True if offline else None, "home": home})


def main() -> None:
    """Entry point: an error is one sentence on standard error and an exit code that is not 0."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, prog_name="lichen")
    except LichenError as error:
        _complain(str(error), debug)
        code = 2 if isinstance(error, ConfigError) else 1
    except typer.Exit as done:
        code = done.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        code = 0
        sys.stdout = None  # the reader has left; nothing more can be flushed to it
    except Exception as error:
        usage: Any = error  # click's own errors, such as a missing argument, know how to show themselves
        if hasattr(error, "exit_code") and hasattr(error, "show"):
            usage.show()
            code = usage.exit_code
        else:
            hint = "" if debug else " Run it again as 'lichen --debug …' for the details."
            _complain(f"An unexpected error occurred: {type(error).__name__}: {error}.{hint}", debug)
            code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _complain(sentence: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"lichen: {sentence}", file=sys.stderr)
