"""What is told of machines of several kinds, and that lies about hardware harm nobody."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.devices import cgroup, mac
from lichen.devices.build import compiled_for, unused_features
from lichen.devices.cores import Cache, Cores, Node, caches, cores, nodes
from lichen.devices.disk import measure_disk
from lichen.devices.gpu import Gpu, _nvml, _torch, amd, clean, nvidia
from lichen.devices.hardware import class_here, examine, hardware_class, memory_step
from lichen.devices.power import Heat, Power, heat, power
from lichen.devices.probe import Machine, within
from lichen.devices.sysfs import MAX_PROCESSOR, by_numbers, number, number_list, read_files, size
from lichen.errors import DiskFull, StoreError
from tests.devices.machines import MAC, gpu_box, half_a_core, laptop, old_container, phone_board, service

ALL = frozenset(range(8))
MACHINE = Machine(
    cpu="A CPU",
    isa="x86-64-v3",
    features=("avx2",),
    physical_cores=4,
    threads=4,
    cores=8.0,
    memory_total=int(15.6 * (1 << 30)),
    memory_available=1 << 30,
)

# ---- cores, caches, nodes -------------------------------------------------------------------------


def test_a_hybrid_laptop() -> None:
    files = laptop()
    assert cores(files, ALL) == Cores(physical=6, performance=2, efficiency=4, threads=8, max_mhz=4700)
    assert caches(files) == (
        Cache(level=1, kind="Data", size=48 << 10, instances=6),
        Cache(level=1, kind="Instruction", size=32 << 10, instances=6),
        Cache(level=2, kind="Unified", size=2 << 20, instances=6),
        Cache(level=3, kind="Unified", size=12 << 20, instances=1),
    )
    # a part of it, by affinity: one thread of a fast core and two thrifty ones; then thrifty ones alone
    assert cores(files, frozenset({1, 4, 5})).performance == 1
    assert cores(files, frozenset({4, 5})) == Cores(
        physical=2, performance=2, efficiency=0, threads=2, max_mhz=3500
    )


def test_kinds_of_cores_by_frequency_and_by_capacity() -> None:
    unnamed = {name: text for name, text in laptop().items() if "/cpus" not in name}
    assert cores(unnamed, ALL).performance == 2
    boost = unnamed | {
        f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq": str(4_500_000 + 100_000 * cpu)
        for cpu in ALL
    }
    assert cores(boost, ALL).efficiency == 0  # steps of boost make no other kind
    assert cores(phone_board(), ALL) == Cores(physical=8, performance=2, efficiency=6, threads=8)


def test_where_nothing_tells_of_cores() -> None:
    assert cores({}, ALL) == Cores(physical=8, performance=8, efficiency=0, threads=8)
    assert cores({}, ALL, physical=4) == Cores(physical=4, performance=4, efficiency=0, threads=8)
    assert (caches({}), nodes({})) == ((), ())


def test_a_mac() -> None:
    assert mac.processor(MAC) == ("Apple M2", frozenset({"asimd", "asimddp", "i8mm"}))
    assert mac.core_counts(MAC) == (4, 4)
    intel = "machdep.cpu.features: SSE3 AVX1.0 SSE4.1\nmachdep.cpu.leaf7_features: AVX2\nhw.physicalcpu: 6"
    assert mac.processor(intel) == ("", frozenset({"sse3", "avx", "sse4_1", "avx2"}))
    assert mac.core_counts(intel) == (6, 0)
    assert mac.core_counts("") == (0, 0)


def test_a_gpu_box() -> None:
    files = gpu_box()
    assert nodes(files) == (
        Node(number=0, processors=4, memory=64 << 30),
        Node(number=1, processors=4, memory=64 << 30),
    )
    assert caches(files) == (Cache(level=3, kind="Unified", size=32 << 20, instances=2),)
    card = Gpu(name="NVIDIA H100 80GB HBM3", source="driver")
    assert nvidia(files, frozenset({0, 1})) == (card, card)
    assert nvidia(files, frozenset({1})) == (card,)  # a container got one of the two
    assert nvidia(files, frozenset()) == ()
    assert amd(files) == (Gpu(name="AMD Instinct MI210", memory=64 << 30, source="driver"),)


def test_gpus_by_nvml_and_by_an_imported_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for two libraries that need a card."""
    nvml = types.ModuleType("pynvml")
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda device: b"A\x1b[2J Card",
        "nvmlDeviceGetMemoryInfo": lambda device: types.SimpleNamespace(total=8 << 30),
    }
    for name, function in functions.items():
        setattr(nvml, name, function)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert _nvml() == (Gpu(name="A [2J Card", memory=8 << 30, source="nvml"),)
    monkeypatch.setattr(nvml, "nvmlInit", lambda: 1 / 0, raising=False)  # no driver
    assert _nvml() == ()

    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: types.SimpleNamespace(name="A Card", total_memory=8 << 30),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert _torch() == (Gpu(name="A Card", memory=8 << 30, source="torch"),)
    cuda.is_available = lambda: 1 / 0
    assert _torch() == ()
    monkeypatch.delitem(sys.modules, "torch")
    assert _torch() == ()
    assert clean("A\0B\n  C" + "x" * 100) == ("A B C" + "x" * 100)[:80]


# ---- containers -----------------------------------------------------------------------------------


def test_containers_and_services() -> None:
    small, slice_, old = half_a_core(), service(), old_container()
    assert (cgroup.cpu_quota(small), cgroup.memory_limit(small)) == (0.5, 512 << 20)
    assert (cgroup.memory_use(small), cgroup.memory_left(small)) == (200 << 20, 312 << 20)
    assert (cgroup.cpu_quota(slice_), cgroup.memory_limit(slice_)) == (2.0, 2 << 30)
    assert cgroup.memory_left(slice_) == 1 << 29
    assert (cgroup.cpu_quota(old), cgroup.memory_limit(old)) == (1.5, 1 << 30)
    assert (cgroup.memory_use(old), cgroup.memory_left(old)) == (800, (1 << 30) - 800)
    assert [within(8, quota) for quota in (0.5, 1.5, 3.0, 99.0, None)] == [1, 2, 3, 8, 8]


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("lies", None), ("1 0", None), ("-5 100", None), ("100000", None), ("9 10", 0.9)],
)
def test_processor_time(text: str, quota: float | None) -> None:
    assert cgroup.cpu_quota({"/sys/fs/cgroup/cpu.max": text}) == quota


@pytest.mark.parametrize(
    ("current", "stat", "used"),
    [("1000", "anon 1\ninactive_file 300\n", 700), ("1000", "", 1000), ("10", "inactive_file 300", 0)],
)
def test_memory_that_a_container_holds(current: str, stat: str, used: int) -> None:
    files = {"/sys/fs/cgroup/memory.current": current, "/sys/fs/cgroup/memory.stat": stat}
    assert cgroup.memory_use(files) == used
    assert cgroup.memory_limit(files) is cgroup.memory_left(files) is None


def test_a_group_that_points_elsewhere_counts_as_the_root() -> None:
    for path in ("/../../etc", "relative", "/a\0b", "/" + "x/" * 100, ""):
        files = {"/proc/self/cgroup": f"0::{path}", "/sys/fs/cgroup/cpu.max": "50000 100000"}
        assert cgroup.cpu_quota(files) == 0.5


def test_groups_are_read_from_their_folders(tmp_path: Path) -> None:
    expected = service()
    for name, text in expected.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert cgroup.read_groups(tmp_path) == expected
    assert cgroup.cpu_quota(cgroup.read_groups(tmp_path / "nothing")) is None


# ---- power and heat -------------------------------------------------------------------------------


def test_battery_and_heat_of_a_laptop() -> None:
    files = laptop()
    assert power(files) == Power(battery=41, mains=False)
    assert power(files).on_battery
    assert heat(files) == Heat(celsius=101.0, limit=100.0, throttled=17)
    assert heat(files).slowed
    plugged = files | {"/sys/class/power_supply/AC/online": "1"}
    assert not power(plugged).on_battery
    cool = files | {"/sys/class/thermal/thermal_zone1/temp": "60000"}
    assert heat(cool) == Heat(celsius=60.0, limit=100.0, throttled=17)
    assert not heat(cool).slowed


def test_a_machine_without_battery_or_sensors() -> None:
    assert power({}) == Power(battery=None, mains=None)
    assert heat({}) == Heat(celsius=None, limit=None, throttled=None)
    alone = {"/sys/class/power_supply/B/type": "Battery", "/sys/class/power_supply/B/capacity": "80"}
    assert power(alone) == Power(battery=80, mains=True)
    assert power(alone | {"/sys/class/power_supply/B/status": "Discharging"}).on_battery
    assert power(alone | {"/sys/class/power_supply/B/capacity": "250"}).battery is None


# ---- the class ------------------------------------------------------------------------------------


def test_the_class_is_made_of_what_stays() -> None:
    own = hardware_class(MACHINE, ())
    assert len(own) == 12
    replace = msgspec.structs.replace
    same = (replace(MACHINE, memory_available=1), replace(MACHINE, memory_total=16 << 30))
    other = (
        replace(MACHINE, memory_total=8 << 30),
        replace(MACHINE, cpu="Another CPU"),
        replace(MACHINE, physical_cores=1, threads=1, cores=0.5),
        replace(MACHINE, features=("avx2", "avx512_vnni")),
    )
    card, seen = Gpu(name="A Card", source="driver"), Gpu(name="A Card", source="torch")
    assert {hardware_class(machine, ()) for machine in same} == {own}
    assert hardware_class(MACHINE, (seen,)) == own
    assert hardware_class(MACHINE, (card,)) == hardware_class(
        MACHINE, (Gpu(name="A Card", memory=8 << 30, source="nvml"),)
    )
    all_others = {hardware_class(machine, ()) for machine in other} | {hardware_class(MACHINE, (card,))}
    assert len(all_others | {own}) == 6


@pytest.mark.parametrize(
    ("gigabytes", "step"), [(15.4, 16), (16, 16), (23.5, 24), (7.7, 8), (3.8, 4), (0.5, 0.5), (0, 0)]
)
def test_memory_in_steps(gigabytes: float, step: float) -> None:
    assert memory_step(int(gigabytes * (1 << 30))) == int(step * (1 << 30))


def test_this_machine(tmp_path: Path) -> None:
    hardware = examine(tmp_path)
    assert hardware.hardware_class == class_here() == examine().hardware_class
    assert 1 <= hardware.machine.threads <= hardware.cores.physical <= hardware.cores.threads
    assert hardware.disk is not None
    assert hardware.disk.read > 1e6 and hardware.disk.write > 1e5
    assert not list(tmp_path.iterdir())


# ---- the disk -------------------------------------------------------------------------------------


def test_a_disk_that_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(DiskFull):
        measure_disk(tmp_path, size=1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be measured"):
        measure_disk(tmp_path / "file" / "folder", size=1 << 20)


# ---- the native library ---------------------------------------------------------------------------


def test_what_the_library_leaves_unused() -> None:
    info = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | AVX512 = 0 | OPENMP = 1"
    assert compiled_for(info) == {"SSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2", "OPENMP"}
    assert unused_features(info, ("avx2", "avx512f", "avx512_vnni")) == ("AVX512", "AVX512_VNNI")
    assert unused_features(info, ("avx2", "fma")) == ()
    assert unused_features("", ("avx2",)) == unused_features("nonsense = x", ("avx2",)) == ()


# ---- hostile texts --------------------------------------------------------------------------------


def test_numbers_sizes_and_lists() -> None:
    assert [number(text) for text in ("7", "0", "-1", "٣", "1e3", "", None, "9" * 30)] == [7, 0, *[None] * 6]
    assert [size(text) for text in ("48K", "32M", "7", "1g", "K", "-1K", "9" * 18 + "G", "3X")] == [
        48 << 10,
        32 << 20,
        7,
        1 << 30,
        *[None] * 4,
    ]
    assert number_list("0-2,8, 10-11") == {0, 1, 2, 8, 10, 11}
    for text in ("", "a", "3-1", "0-99999999999", f"0-{MAX_PROCESSOR}", "1,,2", "-", "1-2-3"):
        assert number_list(text) == frozenset()
    assert sorted(("cpu10", "cpu2", "cpu1"), key=by_numbers) == ["cpu1", "cpu2", "cpu10"]


def test_special_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b" 7\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_bytes(b"1" * 70_000)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert read_files(["/*", "/nothing/*"], tmp_path) == {"/good": "7", "/binary": "\ufffd\ufffd"}


NAMES = st.sampled_from(sorted({*laptop(), *gpu_box(), *phone_board()}))
ODD_TEXT = st.text(alphabet="0123456789-,.KMGe \n:/\0\u0663\ud800", max_size=40)
TEXTS = st.one_of(ODD_TEXT, st.integers().map(str), st.sampled_from(["0-7", "max 1", "Battery"]))


@settings(deadline=None)
@given(st.dictionaries(NAMES, TEXTS, max_size=40), st.frozensets(st.integers(0, 9), min_size=1))
def test_whatever_files_say_the_answers_are_sane(lies: dict[str, str], usable: frozenset[int]) -> None:
    files = laptop() | gpu_box() | lies
    found = cores(files, usable)
    assert 1 <= found.performance <= found.physical <= found.threads == len(usable)
    assert found.performance + found.efficiency == found.physical
    assert all(cache.size > 0 and cache.instances > 0 for cache in caches(files))
    assert all(node.memory >= 0 for node in nodes(files))
    charge = power(files).battery
    assert charge is None or 0 <= charge <= 100
    degrees = heat(files).celsius
    assert degrees is None or 0 < degrees < 200
    for gpu in (*nvidia(files, frozenset({0, 1})), *amd(files)):
        assert gpu.name.isprintable() and 0 < len(gpu.name) <= 80


GROUP_NAMES = st.sampled_from(sorted({*service(), *old_container(), *half_a_core()}))


@settings(deadline=None)
@given(st.dictionaries(GROUP_NAMES, TEXTS | st.text(alphabet="0:/.,ab\n", max_size=40)))
def test_whatever_groups_say_the_limits_are_sane(lies: dict[str, str]) -> None:
    files = service() | lies
    quota, limit, left = cgroup.cpu_quota(files), cgroup.memory_limit(files), cgroup.memory_left(files)
    assert quota is None or quota > 0
    assert limit is None or limit > 0
    assert left is None or (limit is not None and left >= 0)
