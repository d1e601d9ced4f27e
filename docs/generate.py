"""Write docs/reference/ from the program, so that it cannot lie. `--check` fails on a difference."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from lichen import errors
from lichen.config import SETTINGS
from lichen.runtime.http.openapi import document
from lichen.runtime.metrics import METRICS

FOLDER = Path(__file__).resolve().parent / "reference"
COMMANDS = (
    "",
    "chat",
    "run",
    "serve",
    "pull",
    "models",
    "rm",
    "quantize",
    "eval",
    "fingerprint",
    "plan",
    "keys",
    "keys create",
    "keys list",
    "keys revoke",
    "adapters",
    "adapters list",
    "adapters show",
    "adapters promote",
    "adapters rollback",
    "adapters diff",
    "adapters export",
    "adapters import",
    "adapters remove",
    "feedback",
    "feedback list",
    "feedback show",
    "feedback export",
    "feedback forget",
    "learn",
    "fleet",
    "fleet init",
    "fleet publish",
    "fleet renew",
    "fleet rollout",
    "fleet pause",
    "fleet resume",
    "fleet rollback",
    "fleet watch",
    "fleet status",
    "fleet collect",
    "fleet members",
    "fleet keys",
    "fleet keys list",
    "fleet keys rotate",
    "fleet enrol",
    "fleet verify",
    "fleet state",
    "fleet pull",
    "fleet cancel",
    "export",
    "import",
    "ps",
    "top",
    "doctor",
    "config",
)


def errors_page() -> str:
    """Every error class with its status, code and meaning."""
    rows = ["# Errors", "", "| error | HTTP status | code | OpenAI type | meaning |", "|---|---|---|---|---|"]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.LichenError):
            meaning = inspect.getdoc(kind) or ""
            rows.append(
                f"| {name} | {kind.status} | `{kind.code}` | `{kind.kind}` | {meaning.splitlines()[0]} |"
            )
    return "\n".join([*rows, ""])


def configuration_page() -> str:
    """Every setting with its names, default and limits."""
    rows = [
        "# Configuration",
        "",
        "A value comes from the first of: flag, environment variable, configuration file (TOML, one key a",
        "setting), default. `lichen config` shows the values in force and where each comes from.",
        "",
        "| setting | variable | default | allowed | what it is for |",
        "|---|---|---|---|---|",
    ]
    for setting in SETTINGS.values():
        rows.append(
            f"| `{setting.name}` | `{setting.variable}` | {setting.default} | {setting.allowed} "
            f"| {setting.description} |"
        )
    return "\n".join([*rows, ""])


def commands_page() -> str:
    """The help of every command, as it is printed 100 columns wide."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TERMINAL_WIDTH": "100"}
    parts = ["# Commands", ""]
    for command in COMMANDS:
        words = [*command.split(), "--help"]
        text = subprocess.run(
            [sys.executable, "-m", "lichen.cli", *words],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        ).stdout.replace("python -m lichen.cli", "lichen")
        body = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts += [f"## lichen {command}".rstrip(), "", "```", body, "```", ""]
    return "\n".join(parts)


def metrics_page() -> str:
    """Every series of `GET /metrics`."""
    rows = [
        "# Metrics",
        "",
        "`GET /metrics` answers in Prometheus' text format. Names that begin with `vllm:` or `llamacpp:`",
        "mean what they mean there, so that dashboards made for those servers work. A daemon with an API key",
        "asks for it here too.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    rows += ["", "Upper ends of the buckets, in seconds:", ""]
    for metric in METRICS:
        if metric.buckets:
            rows.append(f"- `{metric.name}`: {', '.join(f'{bound:g}' for bound in metric.buckets)}")
    return "\n".join([*rows, ""])


def openapi_document() -> str:
    """What `GET /openapi.json` answers, laid out for reading."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


PAGES = {
    "errors.md": errors_page,
    "configuration.md": configuration_page,
    "commands.md": commands_page,
    "metrics.md": metrics_page,
    "openapi.json": openapi_document,
}


def main() -> int:
    """Write the pages, or with --check only compare them."""
    stale = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                FOLDER.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"docs/reference is out of date: {', '.join(stale)}. Run: make docs")
        return 1
    print("generated docs: " + (", ".join(stale) + " written" if stale else "up to date"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
