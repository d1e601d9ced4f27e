"""A raw `llama_decode` loop as its own process: the bare library, one sequence, greedy, nothing else.

Reads one JSON job from stdin ({"model", "threads", "context", "prompts", "limits"}) and prints one JSON
line. Deliberately not built on `lichen.runtime`: it is the yardstick, so it shares no code with it. The
context is llama.cpp's default but for what the job and lichen fix: threads, size, flash attention on.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as lib

_quiet = lib.llama_log_callback(lambda level, text, user: None)  # referenced: the library keeps the pointer


class RawLoop:
    """Model, context and greedy sampler. Raises RuntimeError when the library refuses something."""

    def __init__(self, model: Path, *, threads: int, context: int) -> None:
        lib.llama_log_set(_quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model.name}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = 1
        parameters.no_perf = True
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._memory = lib.llama_get_memory(self._context)
        self._sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self._sampler, lib.llama_sampler_init_greedy())
        self._batch = lib.llama_batch_init(context, 0, 1)

    def answer(self, text: str, limit: int) -> dict[str, Any]:
        """Continue `text` by up to `limit` tokens; seconds of the whole and between first and last token."""
        lib.llama_memory_clear(self._memory, True)
        started = time.monotonic()
        prompt = self._tokenize(text)
        self._decode(prompt, 0)
        tokens = [self._sample()]
        first = last = time.monotonic()
        while len(tokens) < limit:
            self._decode(tokens[-1:], len(prompt) + len(tokens) - 1)
            token = self._sample()
            if lib.llama_vocab_is_eog(self._vocab, token):
                break
            tokens.append(token)
            last = time.monotonic()
        answer = b"".join(map(self._piece, tokens)).decode("utf-8", "replace")
        return {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "ttft_s": first - started,
            "decode_s": last - first,
            "total_s": time.monotonic() - started,
            "text": answer,
        }

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = lib.llama_tokenize(self._vocab, data, len(data), room, len(room), True, True)
        if count <= 0:
            raise RuntimeError("llama.cpp cannot tokenize the prompt")
        return list(room[:count])

    def _decode(self, tokens: list[int], position: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index == len(tokens) - 1
        code = lib.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _sample(self) -> int:
        return int(lib.llama_sampler_sample(self._sampler, self._context, -1))

    def _piece(self, token: int) -> bytes:
        room = ctypes.create_string_buffer(256)
        length = lib.llama_token_to_piece(self._vocab, token, room, len(room), 0, False)
        return room.raw[: max(length, 0)]


def main() -> None:
    """Run the job of stdin: one warm-up answer, then every prompt with its limit."""
    job = json.load(sys.stdin)
    loop = RawLoop(Path(job["model"]), threads=job["threads"], context=job["context"])
    loop.answer(job["warm_up"], 16)
    answers = [loop.answer(text, limit) for text, limit in job["prompts"]]
    info = lib.llama_print_system_info().decode("utf-8", "replace")
    print(json.dumps({"system_info": info, "answers": answers}))


if __name__ == "__main__":
    main()
