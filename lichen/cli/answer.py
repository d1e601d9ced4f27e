"""`lichen chat` and `lichen run`: talk to a model."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lichen.cli.settings import complete_model, config_of
from lichen.errors import LichenError, RequestError

if TYPE_CHECKING:
    from lichen.cli.answering import Answering
    from lichen.config import Config

HELP = """/help           this text
/clear          forget the conversation
/system TEXT    set the system message
/stats          numbers of the last answer
/exit           leave (also Ctrl-D)
End a line with \\ to go on in the next, or put text between lines of \"\"\"."""

Model = Annotated[str | None, typer.Argument(help="Model to talk to.", autocompletion=complete_model)]
MaxTokens = Annotated[int | None, typer.Option(help="At most this many tokens an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token each time.")]
Seed = Annotated[int | None, typer.Option(help="Repeat the same draws.")]
System = Annotated[str | None, typer.Option(help="System message.")]
NoDaemon = Annotated[bool, typer.Option("--no-daemon", help="Use the engine in this process.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(chat)
    app.command()(run)


def chat(
    context: typer.Context,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    no_daemon: NoDaemon = False,
) -> None:
    """Chat with a model in the terminal."""
    options = _options(max_tokens=max_tokens, temperature=temperature, seed=seed)
    config = config_of(context, model=model)
    asyncio.run(_chat(config, system, options, model_given=model is not None, use_daemon=not no_daemon))


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model to ask.", autocompletion=complete_model)],
    prompt: Annotated[str | None, typer.Argument(help="What to ask; standard input is added to it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the numbers.")] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")] = None,
    seed: Seed = None,
    stop: Annotated[str | None, typer.Option(help="End the answer before this text.")] = None,
    no_daemon: NoDaemon = False,
) -> None:
    """Ask one question and print the answer."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    question = "\n\n".join(part for part in (prompt, piped.strip("\n")) if part)
    if not question:
        raise RequestError("There is no prompt.", hint='Give one: lichen run MODEL "prompt", or pipe it in.')
    options = _options(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
    )
    asyncio.run(_run(config_of(context, model=model), question, system, options, as_json, not no_daemon))


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _messages(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


async def _run(
    config: Config,
    question: str,
    system: str | None,
    options: dict[str, Any],
    as_json: bool,
    use_daemon: bool,
) -> None:
    from lichen.cli.answering import answering

    messages = [*_messages(system), {"role": "user", "content": question}]
    async with answering(config, model_given=True, use_daemon=use_daemon) as who:
        parts = []
        async for piece in who.stream(messages, options):
            parts.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        print(json.dumps({"text": "".join(parts), **who.result}) if as_json else "")


async def _chat(
    config: Config, system: str | None, options: dict[str, Any], *, model_given: bool, use_daemon: bool
) -> None:
    from lichen.cli.answering import answering

    async with answering(config, model_given=model_given, use_daemon=use_daemon) as who:
        print(f"Talking to {who.label}. /help lists the commands.")
        await Conversation(who, _messages(system), options).run()


class Conversation:
    """One terminal conversation: history, commands, and answers that Ctrl-C stops."""

    def __init__(self, who: Answering, messages: list[dict[str, str]], options: dict[str, Any]) -> None:
        self._who = who
        self._messages = messages
        self._options = options

    async def run(self) -> None:
        """Read and answer until the input ends."""
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 - line editing and history in input()
        while True:
            text = await asyncio.to_thread(read_message)
            if text is None or text.strip() == "/exit":
                return
            if text.startswith("/"):
                self._command(text)
            elif text.strip():
                await self._answer(text)

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name == "/clear":
            self._messages = [m for m in self._messages if m["role"] == "system"]
        elif name == "/system":
            self._messages = [*_messages(rest.strip()), *(m for m in self._messages if m["role"] != "system")]
        elif name == "/stats":
            print(json.dumps(self._who.result, indent=2))
        else:
            print(HELP if name == "/help" else f"There is no command {name}. /help lists them.")

    async def _answer(self, text: str) -> None:
        asked = [*self._messages, {"role": "user", "content": text}]
        parts: list[str] = []
        task = asyncio.ensure_future(self._stream(asked, parts))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
            print()
        except asyncio.CancelledError:
            print("\n(stopped)")
        except LichenError as error:
            print(f"\nlichen: {error}", file=sys.stderr)
            return
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        self._messages = [*asked, {"role": "assistant", "content": "".join(parts)}]

    async def _stream(self, messages: list[dict[str, str]], parts: list[str]) -> None:
        async with aclosing(self._who.stream(messages, self._options)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                parts.append(piece)
                print(piece, end="", flush=True)


def read_message() -> str | None:
    """One message from standard input, over several lines if it asks for them; None at its end."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        if line.strip() == '"""':
            return "\n".join(iter(lambda: input("" if not sys.stdin.isatty() else "… "), '"""'))
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("" if not sys.stdin.isatty() else "… ")
        return line
    except (EOFError, KeyboardInterrupt):
        return None
