"""The adapters that a fleet brought, put where adapters serve: in this machine's registry.

The fleet's slots say what is in use, and the registry follows them: what was confirmed is added and promoted,
what was taken out of use is rolled back. It may run at any time, in the daemon and after `lichen fleet pull`;
what is in its place already stays as it is. An adapter that was made here under the same name is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lichen.adapters.registry import NAME, Registry
from lichen.adapters.versions import Lineage, Version
from lichen.config import Config
from lichen.errors import LichenError
from lichen.sync.manifest import AdapterManifest
from lichen.sync.updates.slots import Slot, Slots

BROUGHT = "fleet"  # the option in a version's lineage that names the target that it came as

log = logging.getLogger("lichen.fleet")


def follow(config: Config, slots: Slots) -> list[str]:
    """Let the registry serve what the slots have in use; what changed, a line each. Blocks.

    An adapter that cannot be put in its place is a warning in the log, and the others go on.
    """
    registry = Registry(config.home / "adapters", limit=config.adapters_limit)
    changed: list[str] = []
    for slot, found in adapters_of(slots.mendable()).items():
        name = slot.partition("/")[2]
        try:
            if line := _follow(registry, slots, name, found):
                changed.append(line)
        except LichenError as error:
            log.warning("The adapter %s from the fleet does not serve: %s", name, error)
    return changed


def adapters_of(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The slots of adapters."""
    return {name: slot for name, slot in slots.items() if name.startswith("adapters/")}


def _follow(registry: Registry, slots: Slots, name: str, slot: Slot) -> str:
    if NAME.fullmatch(name) is None:
        return ""  # a name that no request can have
    serving = registry.active(name) if name in registry.names() else None
    if serving is not None and BROUGHT not in serving.lineage.options:
        log.info("The adapter %s was made on this machine, so the fleet's is not used.", name)
        return ""
    if slot.active is None:
        return _leave(registry, name, serving)
    manifest = slot.active.manifest
    if not slot.confirmed or not isinstance(manifest, AdapterManifest):
        return ""
    if serving is not None and serving.digest == slot.active.sha256:
        return ""
    lineage = Lineage(
        base=manifest.base,
        options={BROUGHT: slot.active.target},
        parent=serving.digest if serving is not None else None,
    )
    file, model = slots.blob(slot.active.sha256), slots.blob(manifest.base)
    version = registry.add(name, file, lineage, model=model)
    registry.promote(name, version.digest)
    return f"The adapter {name} is {slot.active.target} from now on."


def _leave(registry: Registry, name: str, serving: Version | None) -> str:
    """Nothing of the fleet is in use under this name any more."""
    if serving is None:
        return ""
    while serving is not None and BROUGHT in serving.lineage.options:
        serving = registry.rollback(name, reason="the fleet took it back")
    return f"The adapter {name} from the fleet serves no more."
