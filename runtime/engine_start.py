"""Starts the engine of a model that was loaded: its context, what drafts for it, its prefix cache on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lichen.runtime.adaptation import PLAIN
from lichen.runtime.engine import Engine
from lichen.runtime.native import Context, ContextSize, Model
from lichen.runtime.native import version as native_version
from lichen.runtime.speculation.build import build
from lichen.runtime.spill import CacheKey, SpillStores, file_identity

if TYPE_CHECKING:
    from lichen.runtime.served_model import ModelOptions

INDEX_S = 1.0  # a slow disk may delay a start by this much; what it still holds is found later


def start_engine(model: Model, path: Path, sha256: str, options: ModelOptions) -> Engine:
    """A running engine over a model; closes what it has begun when it cannot be made."""
    identity = sha256 or file_identity(path)
    size = ContextSize(
        context=min(options.context or model.context_train, model.context_train or 1 << 20),
        slots=options.slots,
        threads=options.threads,
        batch=max(options.batch, options.slots),
        outputs=options.outputs,
        kv=options.kv_type,
    )
    context = Context(model, size)
    try:
        speculation = build(
            model,
            context,
            options.speculation,
            path=path,
            sha256=sha256,
            identity=identity,
            threads=options.threads,
        )
    except BaseException:
        context.close()
        raise
    spill = _spill_stores(model, context, identity, options)
    if spill is not None:
        spill.of(PLAIN).wait_ready(INDEX_S)
    return Engine(
        model,
        context,
        queue_limit=options.queue,
        spill=spill,
        speculation=speculation,
        share=options.chunk,
    )


def _spill_stores(model: Model, context: Context, identity: str, options: ModelOptions) -> SpillStores | None:
    """The prefix cache of this model on disk; None when it is off."""
    if options.spill_folder is None or not options.spill_limit:
        return None
    key = CacheKey(
        model_sha256=identity,
        adapter_sha256="",
        adapter_scale=0.0,
        template_sha256=hashlib.sha256((model.chat_template() or "").encode()).hexdigest(),
        kv_type=context.kv_type,
        library_version=native_version(),
        context_layout=context.layout,
    )
    return SpillStores(options.spill_folder, options.spill_limit, key)
