"""Files in chunks: publish a version once, fetch only what changed.

    recipe = publish_file(Path("model-2.gguf"), Path("/srv/mirror"), previous=Path("model-1.gguf"))

    mirrors = [open_mirror("https://models.example.org"), open_mirror("s3://bucket/models")]
    recipe = await find_recipe(sha256, mirrors)      # sha256: from signed metadata
    blob = await fetch(recipe, mirrors, store, progress=show, pace=RateLimit(2e6))

A mirror is a folder behind any static file server or object store that answers range requests; see publish.py
for its layout, recipe.py for the format, and decision 9 for what was measured.
"""

from __future__ import annotations

from lichen.sync.fetch import fetch, find_recipe
from lichen.sync.meter import FetchProgress
from lichen.sync.mirrors import Mirror, open_mirror
from lichen.sync.pace import Pace, RateLimit
from lichen.sync.publish import publish_file
from lichen.sync.recipe import Recipe

__all__ = [
    "FetchProgress",
    "Mirror",
    "Pace",
    "RateLimit",
    "Recipe",
    "fetch",
    "find_recipe",
    "open_mirror",
    "publish_file",
]
