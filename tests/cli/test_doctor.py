"""`lichen doctor`: what it makes of several machines, and of this one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from lichen.cli.checks import Finding, unused, writable
from lichen.cli.doctor import disk_findings, machine_findings, model_findings, weights
from lichen.config import Config, override
from lichen.devices.cores import Cores, caches, cores, nodes
from lichen.devices.gpu import Gpu
from lichen.devices.hardware import Hardware
from lichen.devices.power import Heat, Power, heat, power
from lichen.devices.probe import Machine
from tests.cli.test_commands import lichen
from tests.devices.machines import gpu_box, laptop

GB = 1 << 30


def machine(**other: object) -> Machine:
    """A plain one with four cores and 16 GB."""
    plain = Machine(
        cpu="A CPU",
        isa="x86-64-v3",
        features=("avx2", "fma"),
        physical_cores=4,
        threads=4,
        cores=4.0,
        memory_total=16 * GB,
        memory_available=12 * GB,
    )
    return msgspec.structs.replace(plain, **other)


def hardware(**other: object) -> Hardware:
    """The same in full."""
    plain = Hardware(
        hardware_class="0123456789ab",
        machine=machine(),
        cores=Cores(physical=4, performance=4, efficiency=0, threads=4),
        caches=(),
        nodes=(),
        gpus=(),
        power=Power(),
        heat=Heat(),
        swap_total=0,
        swap_used=0,
    )
    return msgspec.structs.replace(plain, **other)


def findings(given: Hardware) -> dict[str, Finding]:
    return {finding.what: finding for finding in machine_findings(given)}


def test_a_laptop_that_is_hot_and_on_battery() -> None:
    files = laptop()
    found = findings(
        hardware(
            cores=cores(files, frozenset(range(8))),
            machine=machine(physical_cores=6, threads=2, cores=8.0),
            caches=caches(files),
            power=power(files),
            heat=heat(files),
        )
    )
    assert found["cores"].detail == "6 (2 fast, 4 thrifty), 8 threads, up to 4.7 GHz"
    assert found["caches"].detail == "L1 48 KB x 6, L2 2 MB x 6, L3 12 MB"
    assert found["power"] == Finding("machine", "power", "fine", "on battery, 41 % charged")
    assert found["heat"].verdict == "warning"
    assert "101 °C, slowed down 17 times" in found["heat"].detail
    low = findings(hardware(power=Power(battery=9, mains=False)))
    assert low["power"].verdict == "warning"
    assert findings(hardware(power=Power(battery=9, mains=True)))["power"].verdict == "fine"


def test_a_container_with_half_a_core() -> None:
    small = machine(cores=0.5, physical_cores=1, threads=1, memory_total=GB // 2, memory_available=GB // 4)
    found = findings(hardware(machine=small, swap_used=GB // 4))
    assert found["cores"].verdict == found["memory"].verdict == found["swap"].verdict == "warning"
    assert "only 0.5 may be used here" in found["cores"].detail
    assert "lower --context or --slots" in found["memory"].detail


def test_a_gpu_box_and_an_old_processor() -> None:
    card = Gpu(name="A Card", memory=80 * 10**9, source="driver")
    box = hardware(nodes=nodes(gpu_box()), gpus=(card,))
    assert findings(box)["GPU"].detail == "A Card, 80.00 GB"
    assert "2 nodes: 4 threads with 68.72 GB" in findings(box)["NUMA"].detail
    old = findings(hardware(machine=machine(isa="x86-64-v2", features=())))
    assert old["processor"].verdict == "warning" and "no AVX2" in old["processor"].detail
    info = "CPU : AVX = 1 | AVX2 = 1"
    assert [(one.what, one.verdict) for one in unused(box, info, offload=False)] == [
        ("speed", "warning"),
        ("GPU support", "warning"),
    ]
    assert not list(unused(box, f"{info} | FMA = 1", offload=True))


@pytest.mark.parametrize(
    ("free", "verdict"), [(10 * GB, "fine"), (GB, "warning"), (1 << 20, "problem"), (0, "problem")]
)
def test_room_on_the_disk(tmp_path: Path, free: int, verdict: str) -> None:
    (finding,) = disk_findings(tmp_path, free, measured=False)
    assert finding.verdict == verdict


def test_the_speed_of_a_disk_that_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, speed = disk_findings(tmp_path / "file" / "home", 10 * GB, measured=True)
    assert (speed.what, speed.verdict) == ("disk speed", "warning")


@pytest.mark.parametrize(
    ("gigabytes", "words"), [(16, "21 B"), (4, "5.3 B"), (0.5, "667 M"), (0.01, "13 M"), (0, "0 M")]
)
def test_sizes_that_fit(gigabytes: float, words: str) -> None:
    assert weights(int(gigabytes * 1e9), 4.8) == words


def test_whether_the_configured_model_fits(tmp_path: Path, model_path: Path) -> None:
    def model(**settings: object) -> tuple[str, str]:
        config = override(Config(), {"home": tmp_path, "model": str(model_path), **settings})
        found = {finding.what: finding for finding in model_findings(config, hardware())}
        return found["model"].verdict, found["model"].detail

    assert model()[0] == "fine"
    verdict, detail = model(memory_limit=1)
    assert verdict == "warning" and "needs" in detail
    assert model(model="nothing")[1] == "nothing is not here yet: lichen pull nothing"
    (tmp_path / "bad.gguf").write_text("bad")
    assert model(model=str(tmp_path / "bad.gguf"))[0] == "warning"


def test_too_many_threads(tmp_path: Path) -> None:
    config = override(Config(), {"home": tmp_path, "threads": 16, "model": "nothing"})
    first = next(iter(model_findings(config, hardware())))
    assert (first.verdict, "more than the 4 cores" in first.detail) == ("warning", True)


def test_this_machine(tmp_path: Path) -> None:
    done = lichen("doctor", "--json", "--disk", home=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert re.fullmatch("[0-9a-f]{12}", report["hardware_class"])
    assert report["hardware"]["machine"]["threads"] >= 1
    rows = {row["what"]: row for row in report["findings"]}
    assert {"processor", "memory", "disk", "disk speed", "threads", "llama.cpp", "store"} <= rows.keys()
    assert {row["verdict"] for row in rows.values()} <= {"fine", "warning"}
    spoken = lichen("doctor", home=tmp_path)
    assert spoken.returncode == 0, spoken.stderr
    assert f"Hardware class: {report['hardware_class']}" in spoken.stdout
    assert re.findall(r"^(Machine|Models|Software) *$", spoken.stdout, re.M) == [
        "Machine",
        "Models",
        "Software",
    ]


def test_what_makes_lichen_unusable_is_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not writable(tmp_path / "file" / "store")
    done = lichen("doctor", home=tmp_path / "file")
    assert done.returncode == 1
    assert "cannot be written to" in " ".join(done.stdout.split())
