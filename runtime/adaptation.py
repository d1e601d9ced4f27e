"""What stands over a model's weights for one request: no adapter, or one by its digest, and how strongly.

Keys and values in a cache depend on it, so it belongs to the key of whatever holds them.
"""

from __future__ import annotations

import msgspec


class Adaptation(msgspec.Struct, frozen=True):
    """An adapter by the sha256 of its file, and the factor on what it adds; `PLAIN` is none. Hashable."""

    digest: str = ""
    scale: float = 0.0

    def __bool__(self) -> bool:
        """Whether there is an adapter."""
        return bool(self.digest)

    def scaled(self, factor: float) -> Adaptation:
        """The same adapter at another strength; none at 0, which is the model alone."""
        return Adaptation(self.digest, self.scale * factor) if self.digest and factor else PLAIN


PLAIN = Adaptation()
