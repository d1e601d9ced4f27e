"""Machines as the files that Linux shows of them: a hybrid laptop, half a core in a container, a GPU box."""

from __future__ import annotations

_CPU = "/sys/devices/system/cpu/cpu"
_ZONE = "/sys/class/thermal/thermal_zone"
_CACHES = ((1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"))


def laptop() -> dict[str, str]:
    """Two fast cores of two threads (cpu0-3), four thrifty ones (cpu4-7); battery at 41 %, unplugged, hot."""
    files = {
        "/sys/devices/cpu_core/cpus": "0-3",
        "/sys/devices/cpu_atom/cpus": "4-7",
        "/sys/class/power_supply/BAT0/type": "Battery",
        "/sys/class/power_supply/BAT0/status": "Discharging",
        "/sys/class/power_supply/BAT0/capacity": "41",
        "/sys/class/power_supply/AC/type": "Mains",
        "/sys/class/power_supply/AC/online": "0",
        "/sys/class/power_supply/hid-mouse/type": "Battery",
        "/sys/class/power_supply/hid-mouse/scope": "Device",
        "/sys/class/power_supply/hid-mouse/capacity": "3",
        f"{_ZONE}0/type": "acpitz",
        f"{_ZONE}0/temp": "46000",
        f"{_ZONE}1/type": "x86_pkg_temp",
        f"{_ZONE}1/temp": "101000",
        f"{_ZONE}1/trip_point_0_type": "critical",
        f"{_ZONE}1/trip_point_0_temp": "110000",
        f"{_ZONE}1/trip_point_1_type": "passive",
        f"{_ZONE}1/trip_point_1_temp": "100000",
        f"{_ZONE}10/type": "iwlwifi",
        f"{_ZONE}10/temp": "-1",
    }
    for cpu in range(8):
        fast = cpu < 4
        siblings = f"{cpu & ~1}-{cpu | 1}" if fast else str(cpu)
        folder = f"{_CPU}{cpu}"
        files[f"{folder}/topology/core_cpus_list"] = siblings
        files[f"{folder}/cpufreq/cpuinfo_max_freq"] = "4700000" if fast else "3500000"
        files[f"{folder}/thermal_throttle/core_throttle_count"] = "17" if cpu == 1 else "0"
        for index, (level, kind, size) in enumerate(_CACHES):
            files |= _cache(folder, index, level, kind, size, siblings if level < 3 else "0-7")
        files |= _cache(folder, 3, 3, "Unified", "12288K", "0-7")
    return files


def half_a_core() -> dict[str, str]:
    """A container (cgroup v2) with half a core and 512 MB, of which 300 are used and 100 can be dropped."""
    return {
        "/proc/self/cgroup": "0::/",
        "/sys/fs/cgroup/cpu.max": "50000 100000",
        "/sys/fs/cgroup/memory.max": str(512 << 20),
        "/sys/fs/cgroup/memory.current": str(300 << 20),
        "/sys/fs/cgroup/memory.stat": f"anon {200 << 20}\ninactive_file {100 << 20}",
    }


def service() -> dict[str, str]:
    """A service outside a container: its own group allows much, the slice above it two cores and 2 GB."""
    own, above = "/sys/fs/cgroup/system.slice/lichen.service", "/sys/fs/cgroup/system.slice"
    return {
        "/proc/self/cgroup": "0::/system.slice/lichen.service",
        f"{own}/cpu.max": "max 100000",
        f"{own}/memory.max": str(8 << 30),
        f"{own}/memory.current": str(1 << 30),
        f"{above}/cpu.max": "200000 100000",
        f"{above}/memory.max": str(2 << 30),
        f"{above}/memory.current": str(3 << 29),
    }


def old_container() -> dict[str, str]:
    """Control groups of version 1: one and a half cores, 1 GB, and no limit further up."""
    memory, cpu = "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu"
    return {
        "/proc/self/cgroup": "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab",
        f"{cpu}/docker/ab/cpu.cfs_quota_us": "150000",
        f"{cpu}/docker/ab/cpu.cfs_period_us": "100000",
        f"{cpu}/cpu.cfs_quota_us": "-1",
        f"{cpu}/cpu.cfs_period_us": "100000",
        f"{memory}/docker/ab/memory.limit_in_bytes": str(1 << 30),
        f"{memory}/docker/ab/memory.usage_in_bytes": "900",
        f"{memory}/docker/ab/memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 100",
        f"{memory}/memory.limit_in_bytes": "9223372036854771712",
    }


def gpu_box() -> dict[str, str]:
    """Two sockets of four cores, a node of memory each; two NVIDIA cards and one of AMD."""
    files = {
        f"/proc/driver/nvidia/gpus/0000:{bus}:00.0/information": (
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 12\nDevice Minor: \t {minor}"
        )
        for minor, bus in enumerate(("19", "3b"))
    }
    card = "/sys/class/drm/card2/device"
    files |= {
        f"{card}/vendor": "0x1002",
        f"{card}/product_name": "AMD Instinct MI210",
        f"{card}/mem_info_vram_total": str(64 << 30),
        "/sys/class/drm/card0/device/vendor": "0x1a03",
        "/sys/class/drm/card1/device/vendor": "0x1002",
        "/sys/class/drm/card1/device/mem_info_vram_total": str(512 << 20),
    }
    for node in range(2):
        folder = f"/sys/devices/system/node/node{node}"
        files[f"{folder}/cpulist"] = f"{4 * node}-{4 * node + 3}"
        files[f"{folder}/meminfo"] = f"Node {node} MemTotal:       67108864 kB\nNode {node} MemFree: 1 kB"
    for cpu in range(8):
        files[f"{_CPU}{cpu}/topology/core_cpus_list"] = str(cpu)
        files |= _cache(f"{_CPU}{cpu}", 3, 3, "Unified", "32M", "0-3" if cpu < 4 else "4-7")
    return files


def phone_board() -> dict[str, str]:
    """An Arm board: two fast cores and six of less than half their capacity."""
    files = {f"{_CPU}{cpu}/cpu_capacity": "1024" if cpu > 5 else "446" for cpu in range(8)}
    return files | {f"{_CPU}{cpu}/topology/core_cpus_list": str(cpu) for cpu in range(8)}


MAC = """machdep.cpu.brand_string: Apple M2
hw.physicalcpu: 8
hw.perflevel0.physicalcpu: 4
hw.perflevel1.physicalcpu: 4
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 0
"""


def _cache(folder: str, index: int, level: int, kind: str, size: str, sharers: str) -> dict[str, str]:
    place = f"{folder}/cache/index{index}"
    return {
        f"{place}/level": str(level),
        f"{place}/type": kind,
        f"{place}/size": size,
        f"{place}/shared_cpu_list": sharers,
    }
