"""Starts llama.cpp's own HTTP server from the `xllamacpp` wheel and sleeps until a signal.

Runs in that wheel's environment, so it imports nothing of lichen or of `bench`. Flags carry the names
of `llama-server`'s own.
"""

from __future__ import annotations

import argparse
import os
import signal

import xllamacpp


def main() -> None:
    """Serve until SIGTERM or SIGINT; the process then ends without ceremony, there is nothing to save."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True)
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--parallel", type=int, required=True, help="slots")
    flags.add_argument("--ctx-size", type=int, required=True, help="tokens of all slots together")
    flags.add_argument("--threads", type=int, required=True)
    flags.add_argument("--batch-size", type=int, default=2048)
    flags.add_argument("--ubatch-size", type=int, default=512)
    flags.add_argument("--flash-attn", choices=["auto", "on", "off"], default="auto")
    flags.add_argument("--kv-unified", action=argparse.BooleanOptionalAction, default=False)
    flags.add_argument("--cache-ram", type=int, default=8192, help="MiB of idle prompts to keep")
    flags.add_argument(
        "--spec-type", default="", help="how to draft: ngram-simple, ngram-map-k, draft-simple ..."
    )
    flags.add_argument("--spec-size-n", type=int, help="tokens of the key that is looked up")
    flags.add_argument("--spec-size-m", type=int, help="tokens of a draft, at most")
    flags.add_argument("--spec-size-min", type=int, help="and at least")
    flags.add_argument("--draft-model", default="", help="a GGUF file, for draft-simple")
    chosen = flags.parse_args()

    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the server's threads, which inherit it
    server = xllamacpp.Server(_parameters(chosen))
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait(signals)
    os._exit(0)  # the server's destructor would first finish every answer under way


def _parameters(chosen: argparse.Namespace) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = chosen.model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = chosen.port
    parameters.n_parallel = chosen.parallel
    parameters.n_ctx = chosen.ctx_size
    parameters.cpuparams.n_threads = chosen.threads
    parameters.cpuparams_batch.n_threads = chosen.threads
    parameters.n_batch = chosen.batch_size
    parameters.n_ubatch = chosen.ubatch_size
    kinds = xllamacpp.llama_flash_attn_type
    parameters.flash_attn_type = {
        "auto": kinds.LLAMA_FLASH_ATTN_TYPE_AUTO,
        "on": kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }[chosen.flash_attn]
    parameters.kv_unified = chosen.kv_unified
    parameters.cache_ram_mib = chosen.cache_ram
    parameters.cont_batching = True
    parameters.warmup = True
    parameters.ui = False
    if chosen.spec_type:
        _draft(parameters.speculative, chosen)
    return parameters


def _draft(speculative: xllamacpp.CommonParamsSpeculative, chosen: argparse.Namespace) -> None:
    kind = chosen.spec_type.upper().replace("-", "_")
    speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
    if chosen.draft_model:
        speculative.draft.mparams.path = chosen.draft_model
        names = {"spec_size_m": "n_max", "spec_size_min": "n_min"}
        of = speculative.draft
    else:
        of = getattr(speculative, chosen.spec_type.replace("-", "_"))
        names = {"spec_size_n": "size_n", "spec_size_m": "size_m"}
        if chosen.spec_type == "ngram-mod":
            names = {"spec_size_n": "n_match", "spec_size_m": "n_max", "spec_size_min": "n_min"}
    for flag, name in names.items():
        if (value := getattr(chosen, flag)) is not None:
            setattr(of, name, value)


if __name__ == "__main__":
    main()
