"""llama.cpp's own llama-server, as the `xllamacpp` wheel carries it.

The C++ server (HTTP, slots, continuous batching, sampling) is the same code as the `llama-server`
program; only `main` is Python, in `bench/xllamacpp_server.py`, and it sleeps while the server runs.
"""

from __future__ import annotations

from bench.peer import ROOT, Peer, Settings


def _arguments(settings: Settings) -> list[str]:
    return [
        str(ROOT / "bench" / "xllamacpp_server.py"),
        *("--model", str(settings.model)),
        *("--port", str(settings.port)),
        *("--parallel", str(settings.slots)),
        *("--ctx-size", str(settings.context * settings.slots)),
        *("--threads", str(settings.threads)),
    ]


PEER = Peer(
    name="llama_server",
    title="llama-server",
    home="xllamacpp",
    requirement="xllamacpp==2026.10.11549",
    health="/health",
    arguments=_arguments,
    identify=(
        "import json, importlib.metadata as metadata, xllamacpp\n"
        "versions = {'xllamacpp': metadata.version('xllamacpp')}\n"
        "print(json.dumps({'versions': versions, 'system_info': xllamacpp.get_system_info()}))"
    ),
    extras={"cache_prompt": True},
    notes=(
        "continuous batching and its prompt cache are on, flash attention is left to it (auto), and the KV "
        "cache has one stream a slot",
    ),
)
