"""From what a request asks for to the numbers of llama.cpp's sampler chain."""

from __future__ import annotations

import secrets

from lichen.runtime.native import SamplerOptions
from lichen.runtime.sequence import SamplingOptions

PENALTY_WINDOW = 64  # tokens that repeat, frequency and presence penalties look back on


def sampler_options(options: SamplingOptions) -> SamplerOptions:
    """The chain's numbers; without a seed a fresh one is drawn, so that equal requests differ."""
    seed = secrets.randbits(32) if options.seed is None else options.seed & 0xFFFFFFFF
    return SamplerOptions(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repeat_penalty=options.repeat_penalty,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        penalty_window=PENALTY_WINDOW,
        logit_bias=tuple(options.logit_bias.items()),
        seed=seed,
    )
