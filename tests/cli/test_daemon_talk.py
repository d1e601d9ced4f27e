"""chat and run against a daemon that breaks off, lies or never ends; no model is needed."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.cli.checks import Finding, daemon, writable
from lichen.config import Config, override
from tests.cli.standin_daemon import StandIn, standing_in

LICHEN = [sys.executable, "-m", "lichen.cli"]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with standing_in() as running:
        yield running


def environment(home: Path, port: int) -> dict[str, str]:
    return {**os.environ, "LICHEN_HOME": str(home), "LICHEN_PORT": str(port), "TERM": "dumb"}


def talk(stand_in: StandIn, home: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LICHEN, *words],
        env=environment(home, stand_in.port),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_whole_answer_and_the_conversation_behind_it(tmp_path: Path, stand_in: StandIn) -> None:
    done = talk(stand_in, tmp_path, "chat", stdin="first\nsecond\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one two\n") == 2
    second = stand_in.bodies[1]["messages"]
    assert isinstance(second, list)
    assert [(m["role"], m["content"]) for m in second] == [
        ("user", "first"),
        ("assistant", "one two"),
        ("user", "second"),
    ]


def test_run_asks_the_daemon_for_any_model_that_it_has(tmp_path: Path, stand_in: StandIn) -> None:
    for name in ("m", "other"):
        done = talk(stand_in, tmp_path, "run", name, "hello")
        assert (done.returncode, done.stdout) == (0, "one two\n"), done.stderr
        assert stand_in.bodies[-1]["model"] == name
    done = talk(stand_in, tmp_path, "run", "missing", "hello")
    assert done.returncode == 1, "the engine in this process has it neither"
    assert len(stand_in.bodies) == 2


def test_chat_without_a_model_takes_the_default_one(tmp_path: Path, stand_in: StandIn) -> None:
    assert talk(stand_in, tmp_path, "chat", stdin="hello\n").returncode == 0
    assert "model" not in stand_in.bodies[0]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("cut", "ended its answer before it was complete"),
        ("abort", "connection to the daemon broke"),
        ("garbage", "not an answer of lichen"),
        ("error", "The engine failed."),
    ],
)
@pytest.mark.parametrize("words", [("run", "m", "hello"), ("chat",)])
def test_a_broken_answer_is_never_taken_for_a_whole_one(
    tmp_path: Path, stand_in: StandIn, answer: str, sentence: str, words: tuple[str, ...]
) -> None:
    stand_in.answer = answer
    done = talk(stand_in, tmp_path, *words, stdin="hello\n" if words == ("chat",) else "")
    assert done.returncode == 1
    assert "one " in done.stdout, "what had arrived was shown"
    assert sentence in done.stderr.strip().splitlines()[-1]
    assert "unexpected" not in done.stderr
    assert "Traceback" not in done.stderr


class Terminal:
    """`lichen chat` in a pseudo-terminal."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.seen = ""
        self.everything = ""
        self._child, self._file = pty.fork()
        if self._child == 0:
            os.execve(sys.executable, [*LICHEN, "chat"], variables)

    def type(self, keys: bytes) -> None:
        os.write(self._file, keys)

    def until(self, words: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.seen and time.monotonic() < deadline:
            self._read()
        assert words in self.seen, self.seen
        self.seen = self.seen.partition(words)[2]

    def exit_code(self, seconds: float = 10) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._read()
            done, status = os.waitpid(self._child, os.WNOHANG)
            if done:
                self._child = 0
                return os.waitstatus_to_exitcode(status)
        pytest.fail(f"chat did not end: {self.seen!r}")

    def close(self) -> None:
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        os.close(self._file)

    def _read(self) -> None:
        if select.select([self._file], [], [], 0.1)[0]:
            try:
                text = os.read(self._file, 65536).decode("utf-8", "replace")
            except OSError:  # Linux's way to say that the other end is closed
                time.sleep(0.05)
                return
            self.seen += text
            self.everything += text


@pytest.fixture
def terminal(tmp_path: Path, stand_in: StandIn) -> Iterator[Terminal]:
    opened = Terminal(environment(tmp_path, stand_in.port))
    yield opened
    opened.close()


@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
@pytest.mark.parametrize("asked", [False, True], ids=["at once", "after an answer"])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_the_chat(terminal: Terminal, key: bytes, asked: bool) -> None:
    terminal.until("> ")
    if asked:
        terminal.type(b"hello\n")
        terminal.until("one two\r\n")
        terminal.until("> ")
    time.sleep(0.3)  # a signal between the prompt and readline's first wait is seen only at the next key
    terminal.type(key)
    assert terminal.exit_code() == 0


def test_ctrl_c_cancels_the_request_and_the_chat_goes_on(terminal: Terminal, stand_in: StandIn) -> None:
    stand_in.answer = "endless"
    terminal.until("> ")
    terminal.type(b"hello\n")
    terminal.until("more more ")
    terminal.type(b"\x03")
    terminal.until("(stopped)")
    assert stand_in.cancelled.wait(5), "the daemon learns that nobody listens"
    stand_in.answer = "whole"
    terminal.until("> ")
    terminal.type(b"again\n")
    terminal.until("one two\r\n")
    terminal.until("> ")
    terminal.type(b"/exit\n")
    assert terminal.exit_code() == 0


def test_a_failed_answer_does_not_end_a_chat_in_a_terminal(terminal: Terminal, stand_in: StandIn) -> None:
    stand_in.answer = "abort"
    terminal.until("> ")
    terminal.type(b"hello\n")
    terminal.until("connection to the daemon broke")
    terminal.until("> ")
    terminal.type(b"\x04")
    assert terminal.exit_code() == 0


def test_an_answer_cannot_command_the_terminal(terminal: Terminal, stand_in: StandIn) -> None:
    stand_in.answer = "escape"
    terminal.until("> ")
    terminal.type(b"hello\n")
    terminal.until("owned")
    terminal.until("two")
    assert "\x1b]0" not in terminal.everything


def test_a_pipe_gets_the_answer_as_it_is(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.answer = "escape"
    assert "\x1b]0;owned\x07two" in talk(stand_in, tmp_path, "run", "m", "hello").stdout


def port_finding(**settings: object) -> Finding:
    return daemon(override(Config(), settings))


def test_doctor_tells_no_daemon_from_a_taken_port_and_a_bad_host(stand_in: StandIn) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert port_finding(port=free.getsockname()[1]).verdict == "fine"
    other = port_finding(port=stand_in.port)  # it has no /status
    assert (other.verdict, "another program" in other.detail) == ("warning", True)
    bad = port_finding(host="no-such-host.invalid")
    assert (bad.verdict, "--host" in bad.detail) == ("problem", True)


def test_a_store_is_writable_or_not(tmp_path: Path) -> None:
    assert writable(tmp_path / "not" / "yet")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not writable(blocked / "store")
