"""Configuration: where values come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.config import HIDDEN, SETTINGS, Config, load, override, shown
from lichen.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('slots = 3\nmodel = "from-file"\nmax_body = "2 MiB"\n')
    return path


def test_flags_beat_variables_beat_the_file_beat_defaults(file: Path) -> None:
    effective = load({"slots": 5, "port": None}, {"LICHEN_SLOTS": "4", "LICHEN_QUEUE": "9"}, file)
    config, origin = effective.config, effective.origin
    assert (config.slots, config.queue, config.model, config.port) == (5, 9, "from-file", 8642)
    assert config.max_body == 2 << 20
    assert str(origin["slots"]) == "flag --slots"
    assert str(origin["queue"]) == "environment LICHEN_QUEUE"
    assert str(origin["model"]) == f"file {file}"
    assert str(origin["port"]) == "default"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LICHEN_SLOTS": "many"}, "LICHEN_SLOTS"),
        ({"LICHEN_SLOTS": "0"}, "1 to 256"),
        ({"LICHEN_SLOTZ": "4"}, "LICHEN_SLOTS"),
        ({"LICHEN_PORT": "70000"}, "65535"),
        ({"LICHEN_OFFLINE": "perhaps"}, "true or false"),
        ({"LICHEN_LOG_LEVEL": "loud"}, "debug"),
        ({"LICHEN_CONFIG": "/nowhere/config.toml"}, "does not exist"),
        ({"LICHEN_API_KEY": "two words"}, "LICHEN_API_KEY"),
    ],
)
def test_a_bad_variable_is_named_with_what_is_allowed(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(None, variables)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"slots = [", "config.toml"),
        (b"slotz = 1", "Did you mean slots"),
        (b"slots = 'three'", "slots in"),
        (b"\xff\xfe", "config.toml"),
        (b"[slots]\nx = 1", "slots"),
        (b"x" * (2 << 20), "config.toml"),
    ],
)
def test_a_bad_file_is_named(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(None, {}, file)


def test_a_secret_is_never_shown() -> None:
    config = override(Config(), {"api_key": "s3cret"})
    assert shown(config, "api_key") == HIDDEN
    assert "s3cret" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        override(Config(), {"api_key": "with space"})
    assert "with space" not in str(caught.value)


def test_an_override_is_checked() -> None:
    with pytest.raises(ConfigError, match="slots"):
        override(Config(), {"slots": 0})


@pytest.mark.parametrize(
    "content",
    [
        b"port" + b".a" * 5000 + b" = 1",
        b"x = " + b"[" * 5000,
        b"port = " + b"9" * 5000,
        b"drain_timeout = nan",
        b"drain_timeout = -inf",
        b"port = true",
        b"port = 8642.0",
        b'home = "\\u0000"',
        b'host = "a\\nb"',
        b"allowed_hosts = [1]",
    ],
)
def test_a_hostile_file_is_refused_and_never_crashes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(None, {}, file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_paths_may_be_relative_to_the_file_and_name_a_home(file: Path) -> None:
    file.write_text('home = "models"\nuds = "~/lichen.sock"\n')
    config = load(None, {}, file).config
    assert config.home == file.parent / "models"
    assert config.uds == Path.home() / "lichen.sock"
    for variables in ({"LICHEN_HOME": "~no-such-user/x"}, {"LICHEN_CONFIG": "~no-such-user/x"}):
        with pytest.raises(ConfigError):
            load(None, variables)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1), st.sampled_from(sorted(SETTINGS)))
def test_any_text_in_a_variable_is_a_value_or_a_config_error(text: str, name: str) -> None:
    variable = f"LICHEN_{name.upper()}"
    try:
        effective = load(None, {variable: text})
    except ConfigError as error:
        assert variable in str(error)
        return
    kind = SETTINGS[name].base
    value = getattr(effective.config, name)
    assert isinstance(value, str if kind is Literal else kind) or (value is None and SETTINGS[name].optional)
    assert str(effective.origin[name]) == (f"environment {variable}" if text.strip() else "default")
