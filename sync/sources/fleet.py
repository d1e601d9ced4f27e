"""`fleet:NAME`: the version of a model that this machine's fleet has put into use under that name.

The store finds it by itself (`Store.resolve`), anew for each request, and nothing is ever copied. What is not
here comes by `lichen fleet pull`, since only that verifies what the fleet signed.
"""

from __future__ import annotations

from lichen.errors import NotFound
from lichen.sync.sources import Origin


async def locate(rest: str) -> Origin:
    """Raises NotFound: a fleet's model that is not here is pulled otherwise."""
    raise NotFound(
        f"Nothing is here under the fleet's name {rest!r}.", hint=f"Get it: lichen fleet pull models/{rest}"
    )
