"""The command line as a person types it: real processes, exit codes, and one-sentence errors."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import RunningDaemon

LICHEN = [sys.executable, "-m", "lichen.cli"]


def lichen(
    *words: str, home: Path, stdin: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LICHEN_HOME": str(home), "LICHEN_PORT": "1", **variables}
    return subprocess.run(
        [*LICHEN, *words],
        env=environment,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("rm", "nothing"), "There is no model 'nothing' in the store"),
        (("pull", "nothing"), "neither a model that lichen knows nor a source"),
        (("pull", "file:/nowhere.gguf"), "There is no file /nowhere.gguf"),
        (("pull", "smollm2-135m", "--sha256", "12"), "64 hexadecimal digits"),
        (("--offline", "pull", "smollm2-135m"), "Offline mode is on"),
        (("ps",), "No lichen daemon answers at 127.0.0.1:1"),
        (("run", "smollm2-135m"), "There is no prompt"),
        (("serve", "--slots", "0"), "--slots"),
        (("serve", "--host", "0.0.0.0"), "no API key is set"),
    ],
)
def test_an_error_is_one_sentence(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    done = lichen(*words, home=tmp_path)
    line = complaint(done)
    assert line.startswith("lichen: ")
    assert sentence in line
    with_debug = lichen("--debug", *words, home=tmp_path)
    assert "Traceback" in with_debug.stderr


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    for words in (("serve", "--port", "abc"), ("frobnicate",), ("rm",)):
        done = lichen(*words, home=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_version_help_and_an_empty_store(tmp_path: Path) -> None:
    assert re.fullmatch(r"lichen \d+\.\d+\.\d+\S*\n", lichen("--version", home=tmp_path).stdout)
    assert "chat" in lichen("--help", home=tmp_path).stdout
    assert "lichen pull" in lichen("models", home=tmp_path).stdout
    assert json.loads(lichen("models", "--json", home=tmp_path).stdout) == []
    assert not (tmp_path / "store").exists(), "looking makes nothing"


def test_pull_list_and_remove(tmp_path: Path, model_path: Path) -> None:
    done = lichen("pull", f"file:{model_path}", "--name", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = json.loads(lichen("models", "--json", home=tmp_path).stdout)
    assert [(m["name"], m["size"]) for m in listed] == [("mine", 98_362_432)]
    assert "Removed mine" in lichen("rm", "mine", home=tmp_path).stdout
    assert json.loads(lichen("models", "--json", home=tmp_path).stdout) == []


def test_config_says_where_values_come_from(tmp_path: Path) -> None:
    done = lichen("config", "--json", home=tmp_path, LICHEN_SLOTS="3", LICHEN_API_KEY="s3cret")
    values = json.loads(done.stdout)
    assert values["slots"] == {"value": "3", "from": "environment LICHEN_SLOTS"}
    assert values["context"]["from"] == "default"
    assert "s3cret" not in done.stdout


def test_doctor_tells_fine_from_not(tmp_path: Path) -> None:
    done = lichen("doctor", "--json", home=tmp_path)
    verdicts = {row["what"]: row["verdict"] for row in json.loads(done.stdout)["findings"]}
    assert verdicts["Python"] == verdicts["llama.cpp"] == "fine"
    assert verdicts["model"] == "warning"
    assert done.returncode == 0


def test_run_reads_a_pipe_and_prints_json(tmp_path: Path, model_path: Path) -> None:
    done = lichen(
        "run", str(model_path), "--json", "--temperature", "0", "--max-tokens", "8",
        home=tmp_path, stdin="Explain in two sentences why the sky is blue.",
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["text"].startswith("The sky is blue")
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["tokens_per_second"] > 0


def test_chat_keeps_the_conversation(tmp_path: Path, model_path: Path) -> None:
    talk = '/nonsense\nHello!\n"""\ntwo\nlines\n"""\nand \\\none more\n/stats\n/exit\n'
    done = lichen("chat", str(model_path), "--max-tokens", "4", "--seed", "1", home=tmp_path, stdin=talk)
    assert done.returncode == 0, done.stderr
    assert "There is no command /nonsense" in done.stdout
    counted = re.search(r'"prompt_tokens": (\d+)', done.stdout)
    assert counted is not None
    assert int(counted[1]) > 60, "the third prompt holds the first two"


def test_a_running_daemon_is_used(tmp_path: Path, daemon: RunningDaemon) -> None:
    port = daemon.url.rpartition(":")[2]
    before = daemon.counters()["requests"]
    done = lichen("run", daemon.model, "Hello!", "--max-tokens", "3", home=tmp_path, LICHEN_PORT=port)
    assert done.returncode == 0, done.stderr
    assert daemon.counters()["requests"] == before + 1
    assert "slots busy" in lichen("ps", home=tmp_path, LICHEN_PORT=port).stdout
    status = json.loads(lichen("ps", "--json", home=tmp_path, LICHEN_PORT=port).stdout)
    assert status["pid"] == daemon.process.pid


def test_ctrl_c_stops_the_answer_and_not_the_program(
    request: pytest.FixtureRequest, tmp_path: Path, model_path: Path
) -> None:
    """In a real terminal: ask for something long, interrupt it, ask again."""
    child, terminal = pty.fork()
    if child == 0:
        environment = {**os.environ, "LICHEN_HOME": str(tmp_path), "LICHEN_PORT": "1", "TERM": "dumb"}
        os.execve(sys.executable, [*LICHEN, "chat", str(model_path), "--temperature", "0"], environment)
    seen = ""
    request.addfinalizer(lambda: subprocess.run(["kill", "-9", str(child)], capture_output=True, check=False))

    def until(words: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 30
        while words not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096).decode("utf-8", "replace")
        assert words in seen, seen

    until("> ")
    os.write(terminal, b"Write a very long story about a forest.\n")
    until("forest.\r\n")
    time.sleep(1.0)
    os.write(terminal, b"\x03")
    until("(stopped)")
    seen = ""
    os.write(terminal, b"Explain in two sentences why the sky is blue.\n")
    until("Rayleigh")
    os.write(terminal, b"\x03")
    until("(stopped)")
    os.write(terminal, b"/exit\n")
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("chat did not end")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def test_shell_completion_knows_the_models(tmp_path: Path) -> None:
    """As bash asks the installed console script."""
    script = str(Path(sys.executable).parent / "lichen")
    request = {"_LICHEN_COMPLETE": "complete_bash", "COMP_WORDS": "lichen rm smol", "COMP_CWORD": "2"}
    environment = {**os.environ, "LICHEN_HOME": str(tmp_path), **request}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["smollm2-135m"]
