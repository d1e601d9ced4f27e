"""Every setting of lichen in one struct, and where its value comes from.

A value is taken from the first of: a flag, the variable `LICHEN_<NAME>`, the configuration file, the
default. Nothing is ignored: an unknown key, an unknown `LICHEN_*` variable and a value out of range are
errors that name the place to mend. Types, limits and descriptions stand once, in `Config`; the flags of
the command line and the reference page are made from them.

The file is TOML with one key a setting, at `$LICHEN_CONFIG` or `config.toml` in the user's configuration
folder. Not covered: a reload while running; a daemon keeps what it was started with.
"""

from __future__ import annotations

import contextlib
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
FOREIGN_PREFIXES = (
    "LICHEN_TEST_",
    "LICHEN_BENCH_",
    "LICHEN_DATA",
    "LICHEN_FLEET_PASSPHRASE",
    "LICHEN_FLEET_READER",
)  # of tests and benchmarks, and secrets
FILE_LIMIT = 1 << 20  # bytes
HIDDEN = "(set, hidden)"
_BOOLEANS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

OriginKind = Literal["flag", "argument", "environment", "file", "default"]
JournalPolicy = Literal["off", "ask", "all"]
LogFormat = Literal["text", "json"]
Speculation = Literal["auto", "off", "suffix", "model", "head"]
KVType = Literal["f16", "q8_0"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


def default_home() -> Path:
    """The folder for models and state: the user's data folder."""
    return Path(platformdirs.user_data_dir("lichen", appauthor=False))


def default_file() -> Path:
    """Where the configuration file lies unless `LICHEN_CONFIG` names another."""
    return Path(platformdirs.user_config_dir("lichen", appauthor=False)) / "config.toml"


def _about(description: str, **extra: Any) -> Meta:
    """What a setting is for. extra: flag, metavar, allowed, default, secret, bytes (see `Setting`)."""
    return Meta(description=description, extra=extra)


# What a value may hold. The words of a refusal are made from the limits, or stand in `allowed`.
Count = Annotated[int, Meta(ge=1, le=256)]
Line = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z", max_length=4096)]
HostName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._:%-]+\Z", max_length=255)]
Key = Annotated[str, Meta(pattern=r"\A[\x21-\x7e]+\Z", max_length=4096)]
Words = tuple[Key, ...]
Hours = Annotated[str, Meta(pattern=r"\A([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]\Z")]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one process, checked. Make it with `load`, and change it with `override`."""

    model: Annotated[
        Line,
        _about(
            "Model to run: a name in the store, a catalog name, a source (pypi:, hf:, https:, file:) or "
            "the path of a GGUF file.",
            metavar="MODEL",
            allowed="a model name, a source or a path",
        ),
    ] = "smollm2-135m"
    home: Annotated[
        Path,
        _about(
            "Folder for models and state; the models are under store/.",
            default="the user's data folder (Linux: ~/.local/share/lichen)",
        ),
    ] = msgspec.field(default_factory=default_home)
    host: Annotated[
        HostName,
        _about(
            "Address that the daemon listens on, and where the other commands look for it.",
            metavar="HOST",
            allowed="a host name or an IP address",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)],
        _about("TCP port of the daemon; 0 takes a free one.", metavar="PORT"),
    ] = 8642
    uds: Annotated[Path | None, _about("Unix socket of the daemon, instead of host and port.")] = None
    api_key: Annotated[
        Key | None,
        _about(
            "Key that clients must send as 'Authorization: Bearer KEY'. Other users of the machine can see "
            "a flag: prefer the variable or the file.",
            metavar="KEY",
            allowed="visible ASCII characters without spaces",
            secret=True,
        ),
    ] = None
    insecure_bind: Annotated[
        bool,
        _about("Allow listening beyond this machine without an API key.", flag="--allow-unauthenticated"),
    ] = False
    allowed_hosts: Annotated[
        Words,
        _about(
            "Names besides loopback that the Host header may hold; '*' allows any.",
            flag="--allowed-host",
            metavar="HOST",
            allowed="a list of host names",
        ),
    ] = ()
    allowed_origins: Annotated[
        Words,
        _about(
            "Web origins, such as https://chat.example, whose pages may call the daemon; '*' allows any.",
            flag="--allowed-origin",
            metavar="ORIGIN",
            allowed="a list of web origins",
        ),
    ] = ()
    context: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 20)],
        _about(
            "Tokens that one conversation may hold; 0 takes what the model was trained for.", metavar="TOKENS"
        ),
    ] = 4096
    intent: Annotated[
        Line | None,
        _about(
            "What the machine is for: latency, throughput, memory, battery or balanced; several, the most "
            "important first, with commas. The other settings then follow from measurements of the model, "
            "but for those that are given (docs/guides/plan.md).",
            metavar="INTENT",
            allowed="one or more of latency, throughput, memory, battery, balanced",
        ),
    ] = None
    objectives: Annotated[
        Line | None,
        _about(
            "Limits that the plan for the intent must keep, and the load to expect, such as 'ttft=300ms, "
            "users=8, memory=2GB'; the names are the flags of 'lichen plan'.",
            metavar="LIST",
            allowed="a list of name=value",
        ),
    ] = None
    slots: Annotated[Count, _about("Conversations that are answered at the same time.")] = 4
    batch: Annotated[
        Annotated[int, Meta(ge=16, le=8192)],
        _about("Tokens that one step of the engine computes at most.", metavar="TOKENS"),
    ] = 256
    chunk: Annotated[
        Annotated[int, Meta(ge=1, le=8192)],
        _about(
            "Tokens that each waiting prompt may put between two tokens of a running answer: more brings "
            "first tokens earlier and makes running answers halt longer.",
            metavar="TOKENS",
        ),
    ] = 64
    kv_type: Annotated[
        KVType,
        _about(
            "How keys and values of the context are stored: q8_0 takes half of the memory.", metavar="TYPE"
        ),
    ] = "f16"
    threads: Annotated[
        Annotated[int, Meta(ge=0, le=512)],
        _about("Threads that compute; 0 takes the physical cores that this process may use."),
    ] = 0
    queue: Annotated[
        Annotated[int, Meta(ge=0, le=100_000)],
        _about("Requests that may wait for a slot; past it a request is refused with status 429."),
    ] = 64
    prefix_cache: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 50)],
        _about(
            "Disk space under prefix-cache/ of the home for what was computed of long prompts, which are "
            "then fast again after a restart; 0 keeps nothing. The files hold prompts.",
            metavar="BYTES",
            allowed="a number of bytes, such as 500000000 or '2 GB'; 0 for none",
            default="2 GB",
            bytes=True,
        ),
    ] = 2_000_000_000
    speculation: Annotated[
        Speculation,
        _about(
            "How tokens are drafted, to be checked several in a step: suffix looks them up in the "
            "conversation and in past answers, model asks the draft model, head a draft head that learns "
            "from kept answers, auto takes what there is. Answers stay the same, and nothing is drafted "
            "where that does not pay.",
            metavar="HOW",
        ),
    ] = "off"
    draft_model: Annotated[
        Line | None,
        _about(
            "Smaller model that drafts: a name in the store or the path of a GGUF file.",
            metavar="MODEL",
            allowed="a model name or a path",
        ),
    ] = None
    draft_head: Annotated[
        Path | None,
        _about(
            "Draft head to begin with, as 'lichen distil' makes one, where none was learned here yet.",
            metavar="FILE",
        ),
    ] = None
    distil_memory: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 40)],
        _about(
            "Disk space under heads/ of the home for what a draft head learns from: only answers that the "
            "journal may keep, only with speculation head or auto, and only where torch is installed; 0 "
            "learns nothing. The files hold answers.",
            metavar="BYTES",
            allowed="a number of bytes, such as 100000000 or '100 MB'; 0 for none",
            default="100 MB",
            bytes=True,
        ),
    ] = 100_000_000
    answer_memory: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 40)],
        _about(
            "Disk space under answers/ of the home for the latest answers of each API key, from which "
            "'suffix' drafts after a restart; 0 keeps nothing. The files hold answers.",
            metavar="BYTES",
            allowed="a number of bytes, such as 8000000 or '8 MB'; 0 for none",
            default="8 MB",
            bytes=True,
        ),
    ] = 8_000_000
    adapter_memory: Annotated[
        Annotated[int, Meta(ge=1_000_000, le=1 << 50)],
        _about(
            "Memory for the adapters of one model; past it those go that nobody uses, the longest idle "
            "first.",
            metavar="BYTES",
            allowed="a number of bytes from 1 MB to 1024 TiB, such as 500000000 or '2 GB'",
            default="1 GB",
            bytes=True,
        ),
    ] = 1_000_000_000
    keep_alive: Annotated[
        Annotated[float, Meta(ge=-1, le=31_536_000)],
        _about(
            "Seconds that a model stays loaded after its last request; -1 keeps it for ever. The configured "
            "model always stays.",
            metavar="SECONDS",
        ),
    ] = 300.0
    memory_limit: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 50)],
        _about(
            "Most memory that lichen may take with all its models; 0 is 80 % of the machine's.",
            metavar="BYTES",
            allowed="a number of bytes up to 1024 TiB, such as 4294967296 or '4 GiB'",
            bytes=True,
        ),
    ] = 0
    max_models: Annotated[
        Annotated[int, Meta(ge=0, le=256)],
        _about("Models that may be loaded at the same time; 0 leaves it to the memory."),
    ] = 0
    max_body: Annotated[
        Annotated[int, Meta(ge=1024, le=1 << 30)],
        _about(
            "Largest HTTP request body.",
            metavar="BYTES",
            allowed="a number of bytes from 1024 to 1 GiB, such as 8388608 or '8 MiB'",
            default="8 MiB",
            bytes=True,
        ),
    ] = 8 << 20
    rate_limit: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)],
        _about(
            "Requests a minute that one API key may send, or one address where no key is needed; past it "
            "a request is refused with status 429. 0 is no limit.",
            metavar="REQUESTS",
        ),
    ] = 0
    request_timeout: Annotated[
        Annotated[float, Meta(ge=0, le=86_400)],
        _about(
            "Seconds after which an answer that is not complete is cancelled with status 504; 0 is no limit.",
            metavar="SECONDS",
        ),
    ] = 600.0
    read_timeout: Annotated[
        Annotated[float, Meta(ge=0.1, le=3600)],
        _about(
            "Seconds that a client gets to send its headers, and again for the body; an idle connection is "
            "closed after as long.",
            metavar="SECONDS",
        ),
    ] = 30.0
    write_timeout: Annotated[
        Annotated[float, Meta(ge=0.1, le=3600)],
        _about("Seconds after which a client that does not read its answer is cut off.", metavar="SECONDS"),
    ] = 60.0
    tls_cert: Annotated[
        Path | None,
        _about("Certificate in PEM form: the daemon then speaks HTTPS. A Unix socket goes without."),
    ] = None
    tls_key: Annotated[
        Path | None,
        _about("Private key of tls_cert in PEM form, without a password; needed unless tls_cert holds it."),
    ] = None
    drain_timeout: Annotated[
        Annotated[float, Meta(ge=0, le=3600)],
        _about("Seconds that running answers get to finish when the daemon stops.", metavar="SECONDS"),
    ] = 30.0
    journal: Annotated[
        JournalPolicy,
        _about(
            "Which answers are kept under learning/ of the home, to be learned from: off keeps none and "
            "takes no feedback; ask keeps those whose request says 'store: true' or whose API key was made "
            "with --keep; all keeps every one unless its request says 'store: false'.",
            metavar="POLICY",
        ),
    ] = "ask"
    journal_limit: Annotated[
        Annotated[int, Meta(ge=1_000_000, le=1 << 40)],
        _about(
            "Disk space for the journal. Past it the oldest answers that nobody rated go first.",
            metavar="BYTES",
            allowed="a number of bytes from 1 MB to 1024 GiB, such as 500000000 or '2 GB'",
            default="1 GB",
            bytes=True,
        ),
    ] = 1_000_000_000
    files_limit: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 50)],
        _about(
            "Disk space for uploaded files to learn from; 0 takes none.",
            metavar="BYTES",
            allowed="a number of bytes, such as 500000000 or '2 GB'; 0 for none",
            default="2 GB",
            bytes=True,
        ),
    ] = 2_000_000_000
    adapters_limit: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 50)],
        _about(
            "Disk space under adapters/ of the home for versions of adapters. Past it the oldest go, but "
            "never one that serves, nor the one before it.",
            metavar="BYTES",
            allowed="a number of bytes, such as 500000000 or '2 GB'",
            default="2 GB",
            bytes=True,
        ),
    ] = 2_000_000_000
    gate_gain: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        _about(
            "Share by which a new adapter must lower the loss on the held-out part of its lesson.",
            metavar="SHARE",
        ),
    ] = 0.05
    gate_general: Annotated[
        Annotated[float, Meta(ge=0, le=10)],
        _about("Share by which a new adapter may raise the loss on general answers.", metavar="SHARE"),
    ] = 0.01
    gate_earlier: Annotated[
        Annotated[float, Meta(ge=0, le=10)],
        _about("Share that a new adapter may lose of each earlier lesson.", metavar="SHARE"),
    ] = 0.02
    auto_rollback: Annotated[
        bool,
        _about(
            "Let the version before serve again by itself when answers of a new version of an adapter are "
            "rated worse, are less expected by the model, or are guessed less well by drafts, by more than "
            "chance explains."
        ),
    ] = True
    auto_learn: Annotated[
        bool,
        _about(
            "Learn by itself from what was corrected or liked, whoever said it, into the adapter 'feedback', "
            "which everybody who uses this daemon may then ask for.",
        ),
    ] = False
    auto_learn_after: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)],
        _about("New corrections and liked answers before it learns by itself.", metavar="LESSONS"),
    ] = 20
    auto_learn_idle: Annotated[
        Annotated[float, Meta(ge=0, le=10_000)],
        _about("Minutes without a request before it learns by itself.", metavar="MINUTES"),
    ] = 10.0
    auto_learn_minutes: Annotated[
        Annotated[float, Meta(ge=0.01, le=10_000)],
        _about("About how long one learning by itself may train.", metavar="MINUTES"),
    ] = 30.0
    auto_learn_memory: Annotated[
        Annotated[int, Meta(ge=1_000_000, le=1 << 50)],
        _about(
            "Memory that must be free before it learns by itself, and that it may then take.",
            metavar="BYTES",
            allowed="a number of bytes from 1 MB to 1024 TiB, such as 500000000 or '2 GB'",
            default="2 GB",
            bytes=True,
        ),
    ] = 2_000_000_000
    auto_learn_disk: Annotated[
        Annotated[int, Meta(ge=1_000_000, le=1 << 50)],
        _about(
            "Disk space that must be free before it learns by itself, and that it may then take.",
            metavar="BYTES",
            allowed="a number of bytes from 1 MB to 1024 TiB, such as 500000000 or '2 GB'",
            default="2 GB",
            bytes=True,
        ),
    ] = 2_000_000_000
    auto_learn_hours: Annotated[
        Hours | None,
        _about(
            "Hours of the day, in local time, in which it may begin to learn by itself, such as 22:00-06:30; "
            "none for always.",
            metavar="HH:MM-HH:MM",
            allowed="two times of day, such as 22:00-06:30",
        ),
    ] = None
    auto_learn_battery: Annotated[
        bool, _about("Learn by itself also while the machine runs on its battery.")
    ] = False
    fleet_updates: Annotated[
        bool,
        _about("Let a daemon on a machine of a fleet take the fleet's updates on its own."),
    ] = True
    fleet_every: Annotated[
        Annotated[float, Meta(ge=1, le=2_592_000)],
        _about("Seconds between two looks for updates of the fleet.", metavar="SECONDS"),
    ] = 3600.0
    fleet_window: Annotated[
        Annotated[str, Meta(pattern=r"\A([0-2]\d:[0-5]\d-[0-2]\d:[0-5]\d)?\Z")],
        _about(
            "Hours of local time in which updates are fetched and put into use, such as 22:00-06:00; "
            "empty for all day.",
            metavar="HOURS",
            allowed="hours such as 22:00-06:00, or nothing",
        ),
    ] = ""
    fleet_rate: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 50)],
        _about(
            "Most bytes a second for updates; 0 is no limit.",
            metavar="BYTES",
            allowed="a number of bytes, such as 500000 or '500 kB'; 0 for no limit",
            bytes=True,
        ),
    ] = 0
    fleet_metered: Annotated[
        bool, _about("Fetch updates also over a connection that the system calls metered.")
    ] = False
    fleet_battery: Annotated[bool, _about("Fetch and try updates also while on battery.")] = False
    offline: Annotated[bool, _about("Never use the network to fetch a model.")] = False
    log_level: Annotated[
        LogLevel, _about("Least severe log lines to show, on standard error.", metavar="LEVEL")
    ] = "warning"
    log_format: Annotated[
        LogFormat,
        _about(
            "Form of the log lines; level info has one line a request, never with its content.",
            metavar="FORMAT",
        ),
    ] = "text"

    def __repr__(self) -> str:
        """As usual, but a secret never reaches a log or a traceback."""
        return f"Config({', '.join(f'{name}={shown(self, name)}' for name in SETTINGS)})"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one field of `Config`: its names, its type, and words for people."""

    name: str
    flag: str
    variable: str
    type: Any  # with its limits, as msgspec.convert takes it
    base: Any  # without limits: str, int, float, bool, Path, tuple or Literal
    optional: bool
    description: str
    allowed: str
    metavar: str
    default: str
    secret: bool
    is_bytes: bool


def _setting(name: str, kind: Any, default: object) -> Setting:
    """Read a field's annotation: the type first, then its limits, the description last."""
    about: Meta = get_args(kind)[-1]
    limited = get_args(kind)[0]
    optional = type(None) in get_args(limited)
    if optional:
        limited = next(part for part in get_args(limited) if part is not type(None))
    base = get_args(limited)[0] if get_origin(limited) is Annotated else limited
    base = get_origin(base) or base
    extra = about.extra or {}
    return Setting(
        name=name,
        flag=extra.get("flag", "--" + name.replace("_", "-")),
        variable=ENV_PREFIX + name.upper(),
        type=kind,
        base=base,
        optional=optional,
        description=about.description or "",
        allowed=extra.get("allowed") or _in_words(base, kind),
        metavar=extra.get("metavar", "PATH" if base is Path else "N"),
        default=extra.get("default") or _plain(default),
        secret=extra.get("secret", False),
        is_bytes=extra.get("bytes", False),
    )


def _in_words(base: Any, kind: Any) -> str:
    """What a type allows, for a person."""
    if base is Path:
        return "a path"
    if base is bool:
        return "true or false"
    if base is Literal:
        return f"one of {', '.join(get_args(get_args(kind)[0]))}"
    limits = get_args(kind)[1]
    return f"a {'whole ' if base is int else ''}number from {limits.ge} to {limits.le}"


def _plain(value: object) -> str:
    """A value in the words of the configuration file."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings() -> dict[str, Setting]:
    hints = get_type_hints(Config, include_extras=True)
    fields = msgspec.structs.fields(Config)
    return {field.name: _setting(field.name, hints[field.name], field.default) for field in fields}


SETTINGS: dict[str, Setting] = _settings()
_VARIABLES = {setting.variable: setting for setting in SETTINGS.values()}


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
    return HIDDEN if SETTINGS[name].secret and value is not None else _plain(value)


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
        values[key] = _checked(setting, raw, f"{key} in {path}", folder=path.parent)

    for variable, text in _own_variables(environ).items():
        setting = _VARIABLES[variable]
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
        checked[name] = _checked(setting, raw, f"the argument {name}")
    return msgspec.structs.replace(config, **checked)


def _own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """lichen's variables that are set; an empty one counts as not set, as in most Unix programs."""
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable.startswith(FOREIGN_PREFIXES):
            continue
        if variable == FILE_VARIABLE:
            continue
        _known(variable, f"The environment has the unknown variable {variable}.", _VARIABLES)
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
        path = Path(named)
        with contextlib.suppress(RuntimeError):  # a home folder of a user who does not exist
            path = path.expanduser()
        return path.absolute(), True
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
    if setting.base is bool:
        return _BOOLEANS.get(text.lower(), text)
    if setting.base is tuple:
        return [part.strip() for part in text.split(",")]
    if setting.base in (int, float) and not setting.is_bytes:
        try:
            return setting.base(text)
        except ValueError:
            return text
    return text


def _checked(setting: Setting, raw: object, place: str, *, folder: Path | None = None) -> Any:
    """The value in its own type, within its limits. folder: what a relative path starts from."""
    if raw is None and setting.optional:
        return None
    if setting.base is Path:
        return _path(setting, raw, place, folder)
    value = raw
    if isinstance(raw, str):
        if setting.is_bytes:
            value = _byte_count(raw)
        elif setting.base is Literal:
            value = raw.lower()
    try:
        checked = msgspec.convert(value, setting.type)
    except (msgspec.ValidationError, OverflowError, UnicodeError) as error:
        raise _bad(setting, raw, place) from error
    if isinstance(checked, float) and not math.isfinite(checked):
        raise _bad(setting, raw, place)
    return checked


def _path(setting: Setting, raw: object, place: str, folder: Path | None) -> Path:
    if not isinstance(raw, (str, Path)) or not str(raw).strip() or "\0" in str(raw):
        raise _bad(setting, raw, place)
    try:
        path = Path(raw).expanduser()
        return path if path.is_absolute() else (folder or Path.cwd()) / path
    except RuntimeError as error:  # a home folder of a user who does not exist
        raise _bad(setting, raw, place) from error


def _byte_count(text: str) -> int | None:
    """Bytes meant by '8 MiB', '512kb' or '1024'; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([KMG]?)(I?)(B?)", text.strip().upper())
    if match is None or (match[2] and not match[4]) or (match[3] and not match[2]):
        return None
    step = 1024 if match[3] else 1000
    power = " KMG".index(match[2] or " ")
    return int(int(match[1]) * step**power)


def _bad(setting: Setting, raw: object, place: str) -> ConfigError:
    """The one sentence about a value that cannot be used; a secret's value is not repeated."""
    held = "a value that cannot be used" if setting.secret else _quoted(raw)
    return ConfigError(
        f"The setting {setting.name}, from {place}, is {held}; it must be {setting.allowed}.",
        param=setting.name,
    )


def _quoted(raw: object) -> str:
    text = repr(str(raw)) if isinstance(raw, (str, Path)) else _short(raw)
    return text if len(text) <= 80 else text[:77] + "…"


def _short(raw: object) -> str:
    try:
        return str(raw).lower() if raw is None or isinstance(raw, bool) else str(raw)
    except (ValueError, RecursionError):  # thousands of digits, or of tables within each other
        return "something too large to show"
