"""The registry of adapters: what it acknowledged stays, what does not fit stays out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lichen.adapters.registry import ADAPTER, STANDING, Registry
from lichen.adapters.versions import Lineage, Note, Standing, Version
from lichen.errors import AdapterError, DiskFull, ModelFileError, NotFound, RegistryError
from lichen.quant.adapter_check import check_adapter
from lichen.quant.formats import GGMLType
from lichen.quant.gguf_write import write_gguf
from lichen.runtime.resident import Candidate
from lichen.runtime.variants import Catalogue
from tests.adapters.made_adapters import add_made, sha256, write_made
from tests.models.tiny_models import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


def add(registry: Registry, model: Path, seed: int, name: str = "mine", **options: Any) -> Version:
    return add_made(registry, name, model, seed, blocks=range(2), **options)


def test_a_version_is_its_bytes_and_stays_as_it_came(registry: Registry, model: Path) -> None:
    first = add(registry, model, 1)
    assert first == add(registry, model, 1) == registry.version("mine", first.digest[:8])
    assert sha256(registry.file("mine", first.digest)) == first.digest
    assert registry.active("mine") is None and registry.versions("mine") == [first]
    assert registry.names() == ["mine"] and first.ranks["blk.0.attn_q.weight"] == 4
    with pytest.raises(NotFound, match="no active version"):
        registry.version("mine")
    with pytest.raises(NotFound, match="one version 'aaaaaa'"):
        registry.version("mine", "aaaaaa")
    with pytest.raises(NotFound, match="There is no adapter"):
        registry.versions("other")


def test_promotions_are_taken_back_one_by_one_down_to_the_model_alone(
    registry: Registry, model: Path
) -> None:
    one, two, three = (add(registry, model, seed) for seed in (1, 2, 3))
    for version in (one, two, three, three):
        registry.promote("mine", version.digest)
    assert registry.active("mine") == three
    assert registry.rollback("mine", reason="worse") == two
    assert registry.notes("mine", three.digest)[0].values == {"reason": "worse"}
    registry.remove("mine", one.digest)
    assert registry.rollback("mine") is None, "the first one is gone, so the model alone"
    assert registry.standing("mine").history == ("",)
    with pytest.raises(RegistryError, match="none to roll back"):
        registry.rollback("mine")
    registry.promote("mine", two.digest)
    with pytest.raises(RegistryError, match="serves"):
        registry.remove("mine", two.digest)
    registry.remove("mine")
    assert registry.names() == []


def test_only_the_version_that_was_meant_is_taken_back(registry: Registry, model: Path) -> None:
    """Whoever has watched one version must not take back another that was promoted meanwhile."""
    one, two = (add(registry, model, seed) for seed in (1, 2))
    for version in (one, two):
        registry.promote("mine", version.digest)
    assert registry.before("mine") == one.digest
    with pytest.raises(RegistryError, match="Another version"):
        registry.rollback("mine", of=one.digest)
    assert registry.active("mine") == two and not registry.notes("mine", two.digest)
    registry.taint([one.digest])
    assert registry.before("mine") == "", "a tainted version does not come back"
    assert registry.rollback("mine", reason="worse", of=two.digest, facts={"by": "probation"}) is None
    assert registry.notes("mine", two.digest)[0].values == {"reason": "worse", "by": "probation"}


def test_what_learned_from_something_forgotten_is_marked(registry: Registry, model: Path) -> None:
    one, two = (add(registry, model, seed) for seed in (1, 2))
    registry.promote("mine", one.digest)
    registry.promote("mine", two.digest)
    assert registry.taint([one.digest, "f" * 64]) == [one]
    assert registry.standing("mine").tainted.keys() == {one.digest}
    assert registry.rollback("mine") is None, "a tainted version does not come back"
    with pytest.raises(RegistryError, match="forgotten"):
        registry.promote("mine", one.digest)
    assert registry.promote("mine", one.digest, tainted=True) == one


def test_old_versions_make_room_but_never_those_that_serve(model: Path, tmp_path: Path) -> None:
    size = add(Registry(tmp_path / "other"), model, 1).size
    registry = Registry(tmp_path / "adapters", limit=3 * size)
    versions = []
    for seed in range(1, 4):
        versions.append(add(registry, model, seed))
        registry.promote("mine", versions[-1].digest)
    fourth = add(registry, model, 4)
    fifth = add(registry, model, 5, name="other")
    assert registry.versions("mine") == [versions[1], versions[2]], "the active one and the one before"
    assert registry.versions("other") == [fifth] and fourth not in registry.versions("mine")
    assert registry.rollback("mine") == versions[1]


def test_a_difference_names_lessons_options_and_how_far_layers_moved(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    base = sha256(model)
    a_file = write_made(tmp_path / "a.gguf", model, 1, blocks=range(2))
    b_file = write_made(tmp_path / "b.gguf", model, 1, blocks=range(1), kind=GGMLType.BF16)
    scores = {"after": {"loss": 2.0}}
    lineages = [
        Lineage(base=base, lessons=lessons, scores=scores, options={"rank": rank})
        for lessons, rank in ((("x", "y"), 4), (("y", "z"), 8))
    ]
    a = registry.add("mine", a_file, lineages[0], model=model)
    b = registry.add("mine", b_file, lineages[1], model=model)
    found = registry.diff("mine", a.digest, b.digest)
    assert (found.lessons_added, found.lessons_removed) == (("z",), ("x",))
    assert found.options == {"rank": (4, 8)} and not found.scores
    kept, gone = found.layers[0], found.layers[-1]
    assert kept.layer.startswith("blk.0.") and kept.a is not None
    assert kept.distance < 0.02 * kept.a, "the same numbers, rounded"
    assert gone.layer.startswith("blk.1.") and gone.b is None and gone.distance == pytest.approx(gone.a)


def test_norms_are_those_of_the_whole_products(model: Path, tmp_path: Path) -> None:
    from lichen.adapters.compare import read_factors

    one = read_factors(write_made(tmp_path / "a.gguf", model, 1, rank=3))["blk.1.ffn_up.weight"]
    two = read_factors(write_made(tmp_path / "b.gguf", model, 2, rank=5))["blk.1.ffn_up.weight"]
    whole = [(part.b @ part.a * part.scale).ravel().astype(np.float64) for part in (one, two)]
    assert one.inner(two) == pytest.approx(float(whole[0] @ whole[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general_architecture": "qwen2"}, "for models of the kind 'qwen2'"),
        ({"general_type": "model"}, "no LoRA adapter"),
        ({"adapter_type": "control_vector"}, "no LoRA adapter"),
        ({"general_type": None}, "no text general.type"),
        ({"adapter_lora_alpha": None}, "does not say its adapter.lora.alpha"),
        ({"adapter_lora_alpha": 8}, "does not say its adapter.lora.alpha"),
        ({"adapter_lora_alpha": float("nan")}, "no usable number"),
        ({"adapter_lora_alpha": 1e30}, "no usable number"),
        ({"adapter_alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"lichen_base_sha256": "0" * 64}, "was trained over the model 000000000000"),
    ],
)
def test_what_an_adapter_says_of_itself_must_fit(
    change: dict[str, Any], words: str, registry: Registry, model: Path
) -> None:
    with pytest.raises(AdapterError, match=words):
        add(registry, model, 1, **change)
    assert registry.names() == []


Q = "blk.0.attn_q.weight"


def part(name: str, shape: tuple[int, ...], fill: float = 0.5) -> Any:
    return {name: (name, GGMLType.F32, shape, np.full(shape, fill, np.float32))}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (part(f"{Q}.lora_a", (4, 65)), "does not fit blk.0.attn_q.weight"),
        (part(f"{Q}.lora_a", (5, 64)), "does not fit"),
        (part(f"{Q}.lora_b", (127, 4)), "does not fit"),
        (part(f"{Q}.lora_a", (1, 4, 64)), "does not fit"),
        ({f"{Q}.lora_a": None}, "only one half"),
        ({f"{Q}.lora_b": None}, "only one half"),
        (part("blk.9.attn_q.weight.lora_a", (4, 64)), "adapts blk.9.attn_q.weight"),
        (part("token_embd.weight.lora_a", (4, 64)), "adapts token_embd.weight"),
        (part("blk.0.attn_norm.weight.lora_a", (4, 64)), "adapts blk.0.attn_norm.weight"),
        (part("blk.0.attn_q.weight", (4, 64)), "no part of a LoRA adapter"),
        (part(f"{Q}.lora_b", (128, 4), fill=float("nan")), "inf or nan in blk.0.attn_q"),
        (part(f"{Q}.lora_a", (4, 64), fill=float("inf")), "inf or nan"),
    ],
)
def test_every_tensor_must_match_the_model(
    tensors: dict[str, Any], words: str, registry: Registry, model: Path
) -> None:
    with pytest.raises(AdapterError, match=words):
        add(registry, model, 1, tensors=tensors)


def test_hostile_files_are_refused_before_anything_is_read_of_them(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    sound = write_made(tmp_path / "a.gguf", model, 1).read_bytes()
    check_adapter(tmp_path / "a.gguf", model)
    lineage = Lineage(base=sha256(model))
    source = random.Random(1)
    refused = 0
    for number in range(120):
        damaged = bytearray(sound)
        for _ in range(source.randint(1, 3)):
            damaged[source.randrange(2000)] = source.randrange(256)
        if number % 10 == 0:
            damaged = damaged[: source.randrange(len(sound))]
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            registry.add("mine", tmp_path / "bad.gguf", lineage, model=model)
        except (AdapterError, ModelFileError):
            refused += 1
    assert refused > 60, "most flips of a header break it"
    write_gguf(tmp_path / "empty.gguf", {"general.type": "adapter"}, [])
    for path in (tmp_path / "empty.gguf", model):
        with pytest.raises((AdapterError, ModelFileError)):
            registry.add("mine", path, lineage, model=model)


def test_names_and_bases_that_cannot_be(registry: Registry, model: Path, tmp_path: Path) -> None:
    for name in ("", "../x", "A", "a/b", ".hidden", "x" * 65):
        with pytest.raises(NotFound, match="cannot be the name"):
            add(registry, model, 1, name=name)
    with pytest.raises(AdapterError, match="must name its model"):
        registry.add("mine", tmp_path / "x", Lineage(base="short"), model=model)
    add(registry, model, 1)
    other = write_tiny(tmp_path / "other.gguf", "llama", seed=1)
    with pytest.raises(RegistryError, match="Choose another name"):
        add(registry, other, 2)


def test_a_full_disk_changes_nothing(
    registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, model, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(DiskFull):
        add(registry, model, 2)
    assert len(registry.versions("mine")) == 1
    assert not list(registry.folder.glob("*/.*.partial"))


def test_a_file_of_another_form_is_said_and_not_guessed(registry: Registry, model: Path) -> None:
    add(registry, model, 1)
    (registry.folder / "mine" / STANDING).write_text("{")
    with pytest.raises(RegistryError, match="is not what lichen wrote"):
        registry.standing("mine")


def test_the_form_of_the_first_release_still_reads(tmp_path: Path) -> None:
    samples = Path(__file__).parent / "samples"
    version = msgspec.json.decode((samples / "version-v1.json").read_bytes(), type=Version)
    standing = msgspec.json.decode((samples / "standing-v1.json").read_bytes(), type=Standing)
    assert version.digest in standing.history and version.lineage.scores["after"]["loss"] == 1.5


WRITER = """
import sys
from pathlib import Path
from lichen.adapters.registry import Registry
from lichen.adapters.versions import Lineage
folder, model, base, *files = sys.argv[1:]
registry = Registry(Path(folder))
while True:
    for file in files:
        version = registry.add("mine", Path(file), Lineage(base=base), model=Path(model))
        print("added", version.digest, flush=True)
        registry.promote("mine", version.digest)
        print("promoted", version.digest, flush=True)
        if len(registry.versions("mine")) > 3:
            (oldest, *_) = registry.versions("mine")
            registry.remove("mine", oldest.digest)
"""


def test_what_was_acknowledged_survives_kill_9(registry: Registry, model: Path, tmp_path: Path) -> None:
    files = [str(write_made(tmp_path / f"{seed}.gguf", model, seed, rank=1)) for seed in range(6)]
    arguments = [str(registry.folder), str(model), sha256(model), *files]
    source = random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            told = [process.stdout.readline()]  # it runs
            timer = threading.Timer(source.uniform(0, 0.2), process.send_signal, [signal.SIGKILL])
            timer.start()
            told += process.stdout.readlines()
        words = [line.split() for line in told if line.endswith("\n")]
        promoted = [digest for what, digest in words if what == "promoted"]
        there = {version.digest: version for version in registry.versions("mine")}
        for digest in there:
            assert sha256(registry.file("mine", digest)) == digest
        active = registry.active("mine")
        if promoted:
            history = registry.standing("mine").history
            assert promoted[-1] in history[-2:], "at most the promotion that was under way came after it"
        assert active is None or active.digest in there
        what, digest = words[-1]
        assert digest in there or what == "promoted"
    add(registry, model, 99)
    assert not list(registry.folder.glob("*/.*.partial")), "what a killed process left is swept"


async def test_a_catalogue_sees_a_promotion_at_once_and_lists_what_fits(
    registry: Registry, model: Path
) -> None:
    catalogue = Catalogue(registry)
    assert not catalogue.has("mine")
    one, two = (add(registry, model, seed) for seed in (1, 2))
    candidates = [Candidate(name="tiny", path=model), Candidate(name="other", path=model, sha256="0" * 64)]
    assert catalogue.variants(candidates) == []
    for version in (one, two, one):
        registry.promote("mine", version.digest)
        assert (await catalogue.standing("mine")).active == version.digest
        (listed,) = catalogue.variants(candidates)
        assert (listed.name, listed.base, listed.adapter) == ("tiny:mine", "tiny", version.digest)


def test_notes_are_kept_in_their_order(registry: Registry, model: Path) -> None:
    version = add(registry, model, 1)
    for number in range(3):
        registry.note("mine", version.digest[:8], Note(kind="gate", values={"number": number}))
    assert [note.values["number"] for note in registry.notes("mine", version.digest)] == [0, 1, 2]
    assert (registry.folder / "mine" / version.digest / ADAPTER).stat().st_size == version.size
