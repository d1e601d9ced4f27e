"""lichen itself, as a user starts it."""

from __future__ import annotations

from bench.peer import Peer, Settings


def _arguments(settings: Settings) -> list[str]:
    return [
        *("-m", "lichen.cli", "serve"),
        *("--model", str(settings.model)),
        *("--host", "127.0.0.1"),
        *("--port", str(settings.port)),
        *("--slots", str(settings.slots)),
        *("--context", str(settings.context)),
        *("--threads", str(settings.threads)),
        *("--prefix-cache", "0"),  # a run must not find what an earlier one has computed
    ]


PEER = Peer(
    name="lichen",
    title="lichen",
    home="lichen",
    requirement=None,
    health="/health",
    arguments=_arguments,
    identify=(
        "import json, lichen\n"
        "from lichen.runtime import native\n"
        "versions = {'lichen': lichen.__version__, 'llama-cpp-python': native.version()}\n"
        "print(json.dumps({'versions': versions, 'system_info': native.system_info()}))"
    ),
)
