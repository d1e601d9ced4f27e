"""Every setting of lichen in one struct, and where its value comes from.

A value is taken from the first of: a flag, the variable `LICHEN_<NAME>`, the configuration file, the
default. Nothing is ignored: an unknown key, an unknown `LICHEN_*` variable and a value out of range are
errors that name the place to mend. Types, limits and descriptions stand once, in `Config`; the flags of
the command line and the reference page are made from them.

The file is TOML with one key a setting, at `$LICHEN_CONFIG` or `config.toml` in the user's configuration
folder. Not covered: a reload while running; a daemon keeps what it was started with.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import platformdirs
from msgspec import Meta

from lichen.errors import ConfigError

ENV_PREFIX = "LICHEN_"
FILE_VARIABLE = "LICHEN_CONFIG"
FOREIGN_PREFIXES = ("LICHEN_TEST_", "LICHEN_BENCH_")  # variables of the test suite and the benchmarks
FILE_LIMIT = 1 << 20  # bytes
HIDDEN = "(set, hidden)"

OriginKind = Literal["flag", "argument", "environment", "file", "default"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


def default_home() -> Path:
    """The folder for models and state: the user's data folder."""
    return Path(platformdirs.user_data_dir("lichen", appauthor=False))


def default_file() -> Path:
    """Where the configuration file lies unless `LICHEN_CONFIG` names another."""
    return Path(platformdirs.user_config_dir("lichen", appauthor=False)) / "config.toml"


def _about(description: str, allowed: str, *, metavar: str = "TEXT", **more: Any) -> Meta:
    """What a setting is for, and in words what it may hold; `more` are msgspec's own limits."""
    extra = {name: more.pop(name) for name in ("flag", "secret", "default", "bytes") if name in more}
    return Meta(description=description, extra={"allowed": allowed, "metavar": metavar, **extra}, **more)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one process, checked. Make it with `load`, and change it with `override`."""

    model: Annotated[
        str,
        _about(
            "Model to run: a name in the store, a catalog name, a source (pypi:, hf:, https:, file:) or a GGUF file.",
            "a model name, a source or a path",
            metavar="MODEL",
            pattern=r"\A[^\x00-\x1f\x7f]+\Z",
            max_length=4096,
        ),
    ] = "smollm2-135m"
    home: Annotated[
        Path,
        _about(
            "Folder for models and state; the models are under store/.",
            "a path",
            metavar="PATH",
            default="the user's data folder (Linux: ~/.local/share/lichen)",
        ),
    ] = msgspec.field(default_factory=default_home)
    host: Annotated[
        str,
        _about(
            "Address that the daemon listens on, and where chat and run look for one.",
            "a host name or an IP address",
            metavar="HOST",
            pattern=r"\A[A-Za-z0-9._:%-]+\Z",
            max_length=255,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        _about(
            "TCP port of the daemon; 0 takes a free one.",
            "a whole number from 0 to 65535",
            metavar="PORT",
            ge=0,
            le=65535,
        ),
    ] = 8642
    uds: Annotated[
        Path | None,
        _about(
            "Unix socket of the daemon, instead of host and port.", "a path", metavar="PATH", default="none"
        ),
    ] = None
    api_key: Annotated[
        str | None,
        _about(
            "Key that clients must send as 'Authorization: Bearer KEY'. A flag is visible to other users of "
            "the machine; prefer the variable or the file.",
            "visible ASCII characters without spaces",
            metavar="KEY",
            secret=True,
            default="none",
            pattern=r"\A[\x21-\x7e]+\Z",
            max_length=4096,
        ),
    ] = None
    insecure_bind: Annotated[
        bool,
        _about(
            "Allow listening beyond this machine without an API key.",
            "true or false",
            flag="--allow-unauthenticated",
        ),
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        _about(
            "Names besides loopback that the Host header may hold; '*' allows any.",
            "a list of host names without spaces",
            metavar="HOST",
            flag="--allowed-host",
            default="none",
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        _about(
            "Web origins, such as https://chat.example, whose pages may call the daemon; '*' allows any.",
            "a list of origins without spaces",
            metavar="ORIGIN",
            flag="--allowed-origin",
            default="none",
        ),
    ] = ()
    context: Annotated[
        int,
        _about(
            "Context of one conversation in tokens; 0 takes what the model was trained for.",
            "0, or a whole number up to 1048576",
            metavar="TOKENS",
            ge=0,
            le=1 << 20,
        ),
    ] = 4096
    slots: Annotated[
        int,
        _about(
            "Conversations that are answered at the same time.",
            "a whole number from 1 to 256",
            metavar="N",
            ge=1,
            le=256,
        ),
    ] = 4
    threads: Annotated[
        int,
        _about(
            "Threads that compute; 0 takes the physical cores that this process may use.",
            "a whole number from 0 to 512",
            metavar="N",
            ge=0,
            le=512,
        ),
    ] = 0
    queue: Annotated[
        int,
        _about(
            "Requests that may wait for a slot; past it a request is refused with status 429.",
            "a whole number from 0 to 100000",
            metavar="N",
            ge=0,
            le=100_000,
        ),
    ] = 64
    max_body: Annotated[
        int,
        _about(
            "Largest HTTP request body.",
            "a number of bytes from 1024 to 1 GiB, such as 8388608 or '8 MiB'",
            metavar="BYTES",
            bytes=True,
            default="8 MiB",
            ge=1024,
            le=1 << 30,
        ),
    ] = 8 << 20
    drain_timeout: Annotated[
        float,
        _about(
            "Seconds that running answers may take to finish when the daemon is told to stop.",
            "a number of seconds from 0 to 3600",
            metavar="SECONDS",
            ge=0,
            le=3600,
        ),
    ] = 30.0
    offline: Annotated[
        bool, _about("Never use the network to fetch anything; what is not here is an error.", "true or false")
    ] = False
    log_level: Annotated[
        LogLevel,
        _about(
            "Least severe log lines to show, on standard error.",
            "one of debug, info, warning, error, critical",
            metavar="LEVEL",
        ),
    ] = "warning"

    def __repr__(self) -> str:
        """As usual, but a secret never reaches a log or a traceback."""
        return f"Config({', '.join(f'{name}={shown(self, name)}' for name in SETTINGS)})"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one field of `Config`: names, type, and words for people."""

    name: str
    flag: str
    variable: str
    type: Any  # with its limits, as msgspec.convert takes it
    description: str
    allowed: str
    metavar: str
    default: str
    secret: bool
    is_bytes: bool

    @property
    def plain_type(self) -> Any:
        """The type without its limits and without None."""
        bare = get_args(self.type)[0]
        choices = [kind for kind in get_args(bare) if kind is not type(None)]
        is_optional = type(None) in get_args(bare)
        return choices[0] if is_optional else bare


def _settings() -> dict[str, Setting]:
    hints = get_type_hints(Config, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(Config)}
    settings = {}
    for name, kind in hints.items():
        meta = get_args(kind)[1]
        extra = meta.extra
        default = fields[name].default
        settings[name] = Setting(
            name=name,
            flag=extra.get("flag", "--" + name.replace("_", "-")),
            variable=ENV_PREFIX + name.upper(),
            type=kind,
            description=meta.description,
            allowed=extra["allowed"],
            metavar=extra["metavar"],
            default=extra.get("default") or _in_toml_words(default),
            secret=extra.get("secret", False),
            is_bytes=extra.get("bytes", False),
        )
    return settings


def _in_toml_words(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


SETTINGS: dict[str, Setting] = _settings()


class Origin(msgspec.Struct, frozen=True):
    """Where a value comes from. detail: the flag, the variable's name or the file's path."""

    kind: OriginKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}".rstrip()


class Effective(msgspec.Struct, frozen=True):
    """The configuration in force, and for each setting where its value comes from."""

    config: Config
    origin: dict[str, Origin]


def shown(config: Config, name: str) -> str:
    """A setting's value for people, with secrets hidden."""
    value = getattr(config, name)
    if value is None:
        return "none"
    if SETTINGS[name].secret:
        return HIDDEN
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return _in_toml_words(value)


def load(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    *,
    given_as: Literal["flag", "argument"] = "flag",
) -> Effective:
    """The effective configuration. `flags` holds setting names; a None in it means "not given".

    environ: taken from the process where None. file: instead of `$LICHEN_CONFIG` and the usual place.
    Raises ConfigError naming the setting, the place of its value, and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origin = {name: Origin("default") for name in SETTINGS}

    path, must_exist = _file_to_read(environ, file)
    for key, raw in _read_file(path, must_exist=must_exist).items():
        setting = _known(key, f"The file {path} has the unknown key {key!r}.", SETTINGS)
        origin[key] = Origin("file", str(path))
        values[key] = _checked(setting, raw, f"{key} in {path}", base=path.parent)

    for variable, text in _own_variables(environ).items():
        setting = _variables()[variable]
        origin[setting.name] = Origin("environment", variable)
        values[setting.name] = _checked(setting, _from_text(setting, text), f"the variable {variable}")

    for name, raw in (flags or {}).items():
        setting = _known(name, f"There is no setting {name!r}.", SETTINGS)
        if raw is not None:
            place = setting.flag if given_as == "flag" else name
            origin[name] = Origin(given_as, place)
            values[name] = _checked(setting, raw, f"the {given_as} {place}")

    return Effective(Config(**values), origin)


def override(config: Config, values: Mapping[str, object]) -> Config:
    """A copy with other values, checked. Raises ConfigError as `load` does."""
    checked = {}
    for name, raw in values.items():
        setting = _known(name, f"There is no setting {name!r}.", SETTINGS)
        checked[name] = None if raw is None else _checked(setting, raw, f"the argument {name}")
        if raw is None and type(None) not in get_args(get_args(setting.type)[0]):
            raise _bad(setting, "none", f"the argument {name}")
    return msgspec.structs.replace(config, **checked)


def _variables() -> dict[str, Setting]:
    return {setting.variable: setting for setting in SETTINGS.values()}


def _own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """lichen's variables that are set; an empty one counts as not set, as in most Unix programs."""
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable.startswith(FOREIGN_PREFIXES):
            continue
        if variable == FILE_VARIABLE:
            continue
        _known(variable, f"The environment has the unknown variable {variable}.", _variables())
        if text.strip():
            found[variable] = text.strip()
    return found


def _known(name: str, complaint: str, settings: Mapping[str, Setting]) -> Setting:
    setting = settings.get(name)
    if setting is None:
        raise ConfigError(complaint, hint=_nearest(name, settings))
    return setting


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else "'lichen config' lists the settings."


def _file_to_read(environ: Mapping[str, str], file: Path | None) -> tuple[Path, bool]:
    """The configuration file, and whether somebody named it so that it must be there."""
    if file is not None:
        return file, True
    named = environ.get(FILE_VARIABLE, "").strip()
    if named:
        return Path(named).expanduser().absolute(), True
    return default_file(), False


def _read_file(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        if not path.is_file() and (must_exist or path.exists()):
            reason = "is not a file" if path.exists() else "does not exist"
            raise ConfigError(f"The configuration file {path} {reason}.", hint=f"See {FILE_VARIABLE}.")
        with path.open("rb") as stream:
            content = stream.read(FILE_LIMIT + 1)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"The configuration file {path} cannot be read: {reason}.") from error
    if len(content) > FILE_LIMIT:
        raise ConfigError(f"The configuration file {path} is larger than {FILE_LIMIT:,} bytes.")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not UTF-8 text.") from error
    except ValueError as error:  # TOMLDecodeError, and Python's own limit on the digits of a number
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"The configuration file {path} is nested too deeply.") from error


def _from_text(setting: Setting, text: str) -> object:
    """A variable's text as the type of its setting; what does not parse stays text and is refused later."""
    kind = setting.plain_type
    if kind is bool:
        return {"1": True, "true": True, "yes": True, "on": True}.get(text.lower()) or (
            False if text.lower() in {"0", "false", "no", "off"} else text
        )
    if get_origin(kind) is tuple:
        return [part.strip() for part in text.split(",")]
    if kind in (int, float) and not setting.is_bytes:
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _checked(setting: Setting, raw: object, place: str, *, base: Path | None = None) -> Any:
    """The value in its own type, within its limits. base: what a relative path is relative to."""
    kind = setting.plain_type
    value = raw
    if kind is Path and isinstance(raw, (str, Path)):
        return _path(setting, raw, place, base)
    if setting.is_bytes and isinstance(raw, str):
        value = _byte_count(raw)
    elif get_origin(kind) is tuple and isinstance(raw, (list, tuple)):
        return _names(setting, raw, place)
    elif get_origin(kind) is Literal and isinstance(raw, str):
        value = raw.lower()
    try:
        checked = msgspec.convert(value, setting.type)
    except (msgspec.ValidationError, OverflowError) as error:
        raise _bad(setting, raw, place) from error
    if isinstance(checked, float) and not math.isfinite(checked):
        raise _bad(setting, raw, place)
    return checked


def _path(setting: Setting, raw: str | Path, place: str, base: Path | None) -> Path:
    text = str(raw)
    if not text.strip() or "\0" in text:
        raise _bad(setting, text, place)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~nobody-of-that-name
        raise _bad(setting, text, place) from error
    return (base or Path.cwd()) / path


def _names(setting: Setting, raw: list[object] | tuple[object, ...], place: str) -> tuple[str, ...]:
    for item in raw:
        if not isinstance(item, str) or not re.fullmatch(r"[\x21-\x7e]{1,1024}", item):
            raise _bad(setting, item, place)
    return tuple(str(item) for item in raw)


_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "KIB": 1 << 10, "MB": 10**6, "MIB": 1 << 20, "GB": 10**9, "GIB": 1 << 30}


def _byte_count(text: str) -> int | None:
    """Bytes meant by '8 MiB', '512kb' or '1024'; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Za-z]{0,3})", text.strip())
    if match is None or match[2].upper() not in _BYTE_UNITS:
        return None
    return int(match[1]) * _BYTE_UNITS[match[2].upper()]


def _bad(setting: Setting, raw: object, place: str) -> ConfigError:
    """The one sentence about a value that cannot be used; a secret's value is not repeated."""
    held = "a value that cannot be used" if setting.secret else _quoted(raw)
    return ConfigError(
        f"The setting {setting.name}, from {place}, is {held}; it must be {setting.allowed}.",
        param=setting.name,
    )


def _quoted(raw: object) -> str:
    text = repr(str(raw)) if isinstance(raw, (str, Path)) else _in_toml_words(raw)
    return text if len(text) <= 80 else text[:77] + "…"
