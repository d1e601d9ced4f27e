"""`lichen feedback`: looking, exporting and forgetting, on the journal's file itself."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lichen.adapters.journal import Journal
from lichen.adapters.lessons import read_lessons, survey
from lichen.adapters.records import NOBODY, Opinion
from lichen.cli import app
from lichen.errors import JournalDamaged, JournalError, NotFound, RequestError
from tests.adapters.test_journal import bytes_of, kept

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def lichen(home: Path, *words: str, **more: Any) -> Any:
    return CliRunner().invoke(app, ["--home", str(home), "feedback", *words], **more)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Five records: rated up, corrected, rated down, not rated, and a text that was rated up."""
    question = [{"role": "user", "content": "Look!"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    called = [*question, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "index": None}]}]
    called.append({"role": "tool", "tool_call_id": "c1", "content": "green"})
    with closing(Journal.open(tmp_path / "learning" / "journal.db")) as journal, journal.writing():
        journal.keep(kept("good", request={"messages": question, "tools": tools}, created=1e9))
        journal.keep(kept("wrong", request={"messages": called}))
        journal.keep(kept("bad"))
        journal.keep(kept("silent"))
        journal.keep(kept("text", kind="text", request={"prompt": "1,"}, answer={"text": " 2"}))
        journal.rate(NOBODY, "good", 0, Opinion(rating="up"))
        journal.rate(NOBODY, "wrong", 0, Opinion(correction="It is green.", tags=("colour",)))
        journal.rate(NOBODY, "bad", 0, Opinion(rating="down"))
        journal.rate(NOBODY, "text", 0, Opinion(rating="up"))
        journal.used_in([journal.entries(limit=5)[-1].id], "sha-a")
    return tmp_path


def test_looking_where_nothing_was_kept_makes_nothing(tmp_path: Path) -> None:
    for words in (("list",), ("forget", "--all", "--yes")):
        assert "There is no feedback yet" in lichen(tmp_path, *words).stdout
    assert json.loads(lichen(tmp_path, "list", "--json").stdout) == []
    assert isinstance(lichen(tmp_path, "show", "rec_0").exception, NotFound)
    assert lichen(tmp_path, "export").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_list_and_show(home: Path) -> None:
    shown = lichen(home, "list").stdout
    assert "5 kept, 4 of them rated or corrected." in shown
    listed = json.loads(lichen(home, "list", "--json", "--limit", "4").stdout)
    assert [entry["response"] for entry in listed] == ["text", "silent", "bad", "wrong"]
    record = lichen(home, "show", listed[-1]["id"]).stdout
    for words in ("user: Look!", "answer: A bird.", "correction: It is green.", "colour", '"look"'):
        assert words in record
    whole = json.loads(lichen(home, "show", "--json", listed[-1]["id"]).stdout)
    assert whole["answer"]["content"] == "A bird."
    assert isinstance(lichen(home, "show", "rec_0").exception, NotFound)


def test_what_is_exported_can_be_learned_from(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "lessons.jsonl"
    done = lichen(home, "export", "-o", str(file))
    assert "3 lessons; 2 records teach nothing" in done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    survey(file).require_sound()
    good, corrected, text = read_lessons(file)
    assert (good.messages[-1]["content"], good.tools[0]["function"]) == ("A bird.", {"name": "look"})
    assert corrected.messages[-1] == {"role": "assistant", "content": "It is green."}
    assert corrected.messages[1]["tool_calls"] == [CALL]
    assert (text.prompt, text.completion) == ("1,", " 2")
    assert lichen(home, "export").stdout.encode() == file.read_bytes()
    pairs = tmp_path / "pairs.jsonl"
    assert "1 lessons" in lichen(home, "export", "--form", "preference", "--output", str(pairs)).stderr
    survey(pairs).require_sound()
    (pair,) = read_lessons(pairs)
    assert (pair.preferred[0]["content"], pair.rejected[0]["content"]) == ("It is green.", "A bird.")
    assert isinstance(lichen(home, "export", "--form", "poem").exception, RequestError)
    assert isinstance(lichen(home, "export", "-o", str(tmp_path / "none" / "x")).exception, JournalError)


def test_forget_is_meant_and_tells_which_adapters_learned_from_it(home: Path) -> None:
    path = home / "learning" / "journal.db"
    assert b"It is green." in bytes_of(path)
    done = lichen(home, "forget", "wrong", "good")
    assert "Deleted 2 records" in done.stdout
    assert "sha-a had learned" in done.stderr
    assert b"It is green." not in bytes_of(path)
    assert isinstance(lichen(home, "forget", "wrong").exception, NotFound)
    for words in ((), ("rec_1", "--all"), ("--all", "--before", "2020-01-01")):
        assert isinstance(lichen(home, "forget", *words).exception, RequestError)
    assert lichen(home, "forget", "--all", input="n\n").exit_code != 0
    assert "Deleted 0" in lichen(home, "forget", "--before", "2020-01-01", "--yes").stdout
    assert "Deleted 3" in lichen(home, "forget", "--all", input="y\n").stdout
    assert b"What is moss" not in bytes_of(path)


def test_a_damaged_journal_is_one_sentence_and_stays(home: Path) -> None:
    path = home / "learning" / "journal.db"
    path.write_bytes(b"rubbish" * 1000)
    for words in (("list",), ("export",), ("forget", "--all", "--yes")):
        failure = lichen(home, *words).exception
        assert isinstance(failure, JournalDamaged)
        assert "\n" not in str(failure)
    assert path.read_bytes() == b"rubbish" * 1000, "only the daemon puts it aside"
