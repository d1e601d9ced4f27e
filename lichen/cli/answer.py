"""`lichen chat` and `lichen run`: talk to a model."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack, aclosing, suppress
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
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour what had been guessed (docs/speculation.md).")
    ] = False,
    no_daemon: NoDaemon = False,
) -> None:
    """Chat with a model in the terminal."""
    options = _options(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if show_drafts:
        options["show_drafts"] = True
    config = config_of(context, model=model)
    _chat(config, system, options, model_given=model is not None, use_daemon=not no_daemon)


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
                print(for_screen(piece), end="", flush=True)
        print(json.dumps({"text": "".join(parts), **who.result}) if as_json else "")


def _chat(
    config: Config, system: str | None, options: dict[str, Any], *, model_given: bool, use_daemon: bool
) -> None:
    """The loop runs only while something is awaited, and the prompt reads in the main thread.

    A read in another thread cannot be interrupted: Ctrl-C at the prompt would wait for Enter.
    """
    from lichen.cli.answering import answering

    stack = AsyncExitStack()
    with asyncio.Runner() as runner:
        opened = answering(config, model_given=model_given, use_daemon=use_daemon)
        who = runner.run(stack.enter_async_context(opened))
        try:
            print(f"Talking to {who.label}. /help lists the commands.", flush=True)
            Conversation(runner, who, _messages(system), options).run()
        finally:
            runner.run(stack.aclose())


class Conversation:
    """One terminal conversation: history, commands, and answers that Ctrl-C stops."""

    def __init__(
        self, runner: asyncio.Runner, who: Answering, messages: list[dict[str, str]], options: dict[str, Any]
    ) -> None:
        self._runner = runner
        self._who = who
        self._messages = messages
        self._options = options

    def run(self) -> None:
        """Read and answer until the input ends."""
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 - line editing and history in input()
        while True:
            text = read_message()
            if text is None or text.strip() == "/exit":
                return
            if text.startswith("/"):
                self._command(text)
            elif text.strip():
                self._answer(text)

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

    def _answer(self, text: str) -> None:
        asked = [*self._messages, {"role": "user", "content": text}]
        parts: list[str] = []
        try:
            self._runner.run(self._stream(asked, parts))
        except LichenError as error:
            if not sys.stdin.isatty():
                raise  # a script has to see that it failed
            print(f"\nlichen: {error}", file=sys.stderr)
            return
        self._messages = [*asked, {"role": "assistant", "content": "".join(parts)}]

    async def _stream(self, messages: list[dict[str, str]], parts: list[str]) -> None:
        """Print an answer. The runner turns Ctrl-C into a cancellation, which ends the answer only."""
        try:
            async with aclosing(self._who.stream(messages, self._options)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    parts.append(piece)
                    print(coloured(for_screen(piece), self._who.drafted), end="", flush=True)
            print()
            if "show_drafts" in self._options:
                timings = self._who.result.get("timings", {})
                right, guessed = timings.get("draft_n_accepted", 0), timings.get("draft_n", 0)
                print(f"({right} of {guessed} guessed tokens were right)", file=sys.stderr, flush=True)
        except asyncio.CancelledError:
            print("\n(stopped)", flush=True)


_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})


def for_screen(text: str) -> str:
    """A model's text without the control characters by which it could command a terminal."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def coloured(text: str, drafted: bool) -> str:
    """On a terminal, green for text that had been guessed."""
    return f"\x1b[32m{text}\x1b[0m" if drafted and sys.stdout.isatty() else text


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
