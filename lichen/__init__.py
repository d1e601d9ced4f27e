"""lichen: private language models on your own machine, served, taught and kept up to date.

`import lichen` stays cheap: nothing native, no HTTP and no torch is loaded until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from lichen.api import ChatStream as ChatStream
    from lichen.api import Completion as Completion
    from lichen.api import Runtime as Runtime
    from lichen.errors import LichenError as LichenError

__all__ = ["ChatStream", "Completion", "LichenError", "Runtime", "__version__"]

_HOMES = {
    "Runtime": "lichen.api",
    "ChatStream": "lichen.api",
    "Completion": "lichen.api",
    "LichenError": "lichen.errors",
}


def __getattr__(name: str) -> object:
    """Load the public names on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lichen' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
