"""`llama_cpp.server`, the server of llama-cpp-python: one request at a time, no batching."""

from __future__ import annotations

import importlib.metadata

from bench.peer import Peer, Settings


def _arguments(settings: Settings) -> list[str]:
    return [
        *("-m", "llama_cpp.server"),
        *("--model", str(settings.model)),
        *("--host", "127.0.0.1"),
        *("--port", str(settings.port)),
        *("--n_ctx", str(settings.context)),
        *("--n_threads", str(settings.threads)),
        *("--n_threads_batch", str(settings.threads)),
        *("--flash_attn", "true"),
        *("--logits_all", "false"),
        *("--interrupt_requests", "false"),
        *("--verbose", "false"),
    ]


PEER = Peer(
    name="llama_cpp_python",
    title="llama_cpp.server",
    home="llama_cpp_python",
    requirement=f"llama-cpp-python[server]=={importlib.metadata.version('llama-cpp-python')}",
    health="/v1/models",
    arguments=_arguments,
    identify=(
        "import json, llama_cpp\n"
        "info = llama_cpp.llama_print_system_info().decode()\n"
        "print(json.dumps({'versions': {'llama-cpp-python': llama_cpp.__version__}, 'system_info': info}))"
    ),
    extras={"repeat_penalty": 1.0},
    notes=(
        "it answers one request at a time; --interrupt_requests false, since by default a second request "
        "cuts the first one's stream; flash attention on and --logits_all false, both faster than its defaults; "
        "repeat_penalty 1.0 in each request, since its default of 1.1 is not greedy decoding",
        "its streams carry no usage, so its tokens are counted as pieces of text",
    ),
)
