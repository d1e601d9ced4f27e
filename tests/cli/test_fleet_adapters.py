"""What the fleet has in use serves, what it takes back does not, and what was made here stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lichen.adapters.registry import Registry
from lichen.cli.fleet_adapters import follow
from lichen.config import Config
from lichen.sync.download import hash_file
from lichen.sync.manifest import make_manifest
from lichen.sync.updates.slots import Slots, Version
from tests.adapters.made_adapters import add_made, write_made
from tests.models.tiny_models import write_tiny


class Machine:
    """A home with a tiny model in its store, and adapters that arrive in slots."""

    def __init__(self, home: Path) -> None:
        self.config = Config(home=home)
        self.slots = Slots(home / "store")
        self.registry = Registry(home / "adapters")
        self.model = self.keep(write_tiny(home / "tiny.gguf", "llama", layers=2))
        self.base = hash_file(self.model)

    def keep(self, file: Path) -> Path:
        """Put bytes into the store."""
        blob = self.slots.blob(hash_file(file))
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        return blob

    def arrives(self, number: int, *, confirmed: bool = True) -> str:
        """Version `number` of adapters/tone is in use; its digest."""
        blob = self.keep(write_made(self.config.home / "made.gguf", self.model, number))
        fields = {
            "kind": "adapters",
            "name": f"tone-{number}",
            "size": blob.stat().st_size,
            "licence": "MIT",
            "base": self.base,
        }
        manifest = make_manifest(fields, running="0.1.0")
        version = Version(target=manifest.path, sha256=blob.name, manifest=manifest)
        self.slots.switch("adapters/tone", version)
        if confirmed:
            self.slots.confirm("adapters/tone")
        return blob.name

    def serves(self) -> str | None:
        """The digest that answers as tone."""
        return self.registry.standing("tone").active


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_registry_follows_the_slots(machine: Machine) -> None:
    assert follow(machine.config, machine.slots) == []
    first = machine.arrives(1)
    assert follow(machine.config, machine.slots) == ["The adapter tone is adapters/tone-1 from now on."]
    assert machine.serves() == first
    assert follow(machine.config, machine.slots) == []
    second = machine.arrives(2, confirmed=False)
    assert follow(machine.config, machine.slots) == [], "it is on trial"
    machine.slots.confirm("adapters/tone")
    follow(machine.config, machine.slots)
    assert machine.serves() == second
    assert machine.registry.version("tone").lineage.parent == first
    machine.arrives(1)
    follow(machine.config, machine.slots)
    assert machine.serves() == first, "a rollout leads back"
    machine.slots.drop("adapters/tone")
    assert follow(machine.config, machine.slots) == ["The adapter tone from the fleet serves no more."]
    assert machine.serves() is None
    assert follow(machine.config, machine.slots) == []


def test_an_adapter_of_this_machine_is_left_alone(machine: Machine) -> None:
    own = add_made(machine.registry, "tone", machine.model, 9).digest
    machine.registry.promote("tone", own)
    machine.arrives(1)
    assert follow(machine.config, machine.slots) == []
    assert machine.serves() == own
    machine.slots.drop("adapters/tone")
    follow(machine.config, machine.slots)
    assert machine.serves() == own


def test_what_does_not_fit_is_a_warning(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.slots.blob(machine.arrives(1)).write_bytes(b"no adapter")
    assert follow(machine.config, machine.slots) == []
    assert "The adapter tone from the fleet does not serve" in caplog.text
