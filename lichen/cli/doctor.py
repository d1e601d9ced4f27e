"""`lichen doctor`: what this machine is, what that means for models, and what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lichen.cli.checks import Finding, bindings, daemon, python, store, toolchain
from lichen.cli.inspect import AsJson
from lichen.cli.settings import config_of, megabytes, table

if TYPE_CHECKING:
    from lichen.config import Config
    from lichen.devices.hardware import Hardware

LITTLE_MEMORY = 1 << 30  # bytes
LITTLE_DISK, NO_DISK = 2 << 30, 200 << 20  # bytes
SLOW_DISK = 50e6  # bytes a second; a model of 4 GB takes more than a minute to load
LOW_CHARGE = 20  # per cent
# Bits of a weight with its share of scales, and what context and buffers take on top of weights: estimates
# for models whose shape is not known.
BITS = (("4 bits", 4.8), ("8 bits", 8.5))
OVERHEAD = 1.25

MeasureDisk = Annotated[
    bool, typer.Option("--disk", help="Measure the disk of the store, too: about two seconds.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(context: typer.Context, disk: MeasureDisk = False, as_json: AsJson = False) -> None:
    """Check this machine: what it is, what that means for models, what to do.

    The exit code is 1 when something keeps lichen from running.
    """
    from lichen.devices.hardware import examine
    from lichen.devices.probe import disk_free

    config = config_of(context)
    hardware = examine()
    findings = [
        *machine_findings(hardware),
        *disk_findings(config.home, disk_free(config.home), measured=disk),
        *model_findings(config, hardware),
        *software_findings(config, hardware),
    ]
    if as_json:
        typer.echo(json.dumps(_record(hardware, findings), indent=2))
    else:
        _show(hardware, findings)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


# ---- the machine ----------------------------------------------------------------------------------


def machine_findings(hardware: Hardware) -> Iterator[Finding]:
    """What the processor, memory, GPUs, power and heat are like. Pure."""
    yield from _processor(hardware)
    yield from _memory(hardware)
    for gpu in hardware.gpus:
        size = f", {megabytes(gpu.memory)}" if gpu.memory else ""
        yield Finding("machine", "GPU", "fine", f"{gpu.name}{size}")
    power, heat = hardware.power, hardware.heat
    if power.battery is not None:
        low = power.on_battery and power.battery <= LOW_CHARGE
        source = "on battery" if power.on_battery else "on mains"
        yield Finding(
            "machine", "power", "warning" if low else "fine", f"{source}, {power.battery} % charged"
        )
    if heat.celsius is not None or heat.throttled is not None:
        yield _heat(hardware)


def _processor(hardware: Hardware) -> Iterator[Finding]:
    machine, cores = hardware.machine, hardware.cores
    old = machine.isa in ("x86-64", "x86-64-v2")
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    yield Finding(
        "machine",
        "processor",
        "warning" if old else "fine",
        f"{machine.cpu}, {machine.isa}{features}"
        + (": no AVX2, so models run several times slower" if old else ""),
    )
    kinds = f" ({cores.performance} fast, {cores.efficiency} thrifty)" if cores.efficiency else ""
    text = f"{cores.physical}{kinds}, {cores.threads} threads"
    if cores.max_mhz:
        text += f", up to {cores.max_mhz / 1000:.1f} GHz"
    limited = machine.cores < cores.threads
    if limited:
        text += f"; only {machine.cores:g} may be used here (a container's limit)"
    yield Finding("machine", "cores", "warning" if machine.cores < 1 else "fine", text)
    found = [
        f"L{cache.level} {_binary(cache.size)}" + (f" x {cache.instances}" if cache.instances > 1 else "")
        for cache in hardware.caches
        if cache.kind != "Instruction"
    ]
    if found:
        yield Finding("machine", "caches", "fine", ", ".join(found))
    if len(hardware.nodes) > 1:
        spread = ", ".join(
            f"{node.processors} threads with {megabytes(node.memory)}" for node in hardware.nodes
        )
        yield Finding(
            "machine",
            "NUMA",
            "warning",
            f"{len(hardware.nodes)} nodes: {spread}. Bind lichen to one: numactl -N 0 -m 0",
        )


def _memory(hardware: Hardware) -> Iterator[Finding]:
    machine = hardware.machine
    scarce = machine.memory_available < LITTLE_MEMORY
    yield Finding(
        "machine",
        "memory",
        "warning" if scarce else "fine",
        f"{megabytes(machine.memory_available)} of {megabytes(machine.memory_total)} available"
        + (": lower --context or --slots" if scarce else ""),
    )
    if hardware.swap_used > machine.memory_total // 10:
        yield Finding(
            "machine",
            "swap",
            "warning",
            f"{megabytes(hardware.swap_used)} in use: memory is short, and a swapped model crawls",
        )


def _heat(hardware: Hardware) -> Finding:
    heat = hardware.heat
    parts = [] if heat.celsius is None else [f"{heat.celsius:.0f} °C"]
    if heat.throttled:
        parts.append(f"slowed down {heat.throttled} times since the start")
    if heat.slowed:
        parts.append("the system slows the processor down now: let it cool, or lower --threads")
    return Finding(
        "machine", "heat", "warning" if heat.slowed else "fine", ", ".join(parts) or "never too hot"
    )


def disk_findings(folder: Path, free: int, *, measured: bool) -> Iterator[Finding]:
    """Room for models and, when asked for, the speed of their disk."""
    from lichen.devices.disk import measure_disk
    from lichen.errors import LichenError

    yield Finding(
        "machine",
        "disk",
        "problem" if free < NO_DISK else "warning" if free < LITTLE_DISK else "fine",
        f"{megabytes(free)} free at {folder}"
        + ("" if free >= LITTLE_DISK else ": free some, or set LICHEN_HOME"),
    )
    if not measured:
        return
    try:
        speed = measure_disk(folder)
    except LichenError as error:
        yield Finding("machine", "disk speed", "warning", str(error))
        return
    slow = speed.read < SLOW_DISK and not speed.cached
    yield Finding(
        "machine",
        "disk speed",
        "warning" if slow else "fine",
        f"reads {megabytes(speed.read)}/s{' (from memory)' if speed.cached else ''}, "
        f"writes {megabytes(speed.write)}/s" + (": models load slowly" if slow else ""),
    )


# ---- models ---------------------------------------------------------------------------------------


def model_findings(config: Config, hardware: Hardware) -> Iterator[Finding]:
    """What this machine means for models: threads, sizes that fit, and whether the configured one does."""
    from lichen.runtime import memory

    machine = hardware.machine
    threads = config.threads or machine.threads
    why = "configured" if config.threads else "one a fast core" if hardware.cores.efficiency else "one a core"
    many = threads > machine.physical_cores
    yield Finding(
        "models",
        "threads",
        "warning" if many else "fine",
        f"{threads} ({why})"
        + (f": more than the {machine.physical_cores} cores; they wait for each other" if many else ""),
    )
    free = memory.available(config.memory_limit)
    sizes = ", ".join(f"{weights(free, bits)} weights at {name}" for name, bits in BITS)
    yield Finding(
        "models", "sizes that fit", "fine", f"up to about {sizes} ({megabytes(free)} for all of it)"
    )
    yield from _configured(config, free)


def weights(free: int, bits: float) -> str:
    """About how many weights of so many bits fit into `free` bytes beside their context, such as 7.1 B."""
    count = max(0.0, free / OVERHEAD * 8 / bits)
    unit, word = (1e9, "B") if count >= 1e9 else (1e6, "M")
    digits = max(0, 1 - math.floor(math.log10(count / unit))) if count >= 1e5 else 0
    return f"{count / unit:.{digits}f} {word}"


def _configured(config: Config, free: int) -> Iterator[Finding]:
    """Whether the configured model is here, and fits with the configured slots and context."""
    from lichen.api import local_file, model_options
    from lichen.errors import LichenError
    from lichen.quant.gguf_check import check_gguf
    from lichen.runtime import memory
    from lichen.sync.store import Store

    try:
        path = local_file(config.model)
        if path is None:
            kept = Store(config.home / "store", offline=True)
            manifest = kept.resolve(config.model)
            path = kept.blob_path(manifest) if manifest is not None else None
        if path is None:
            yield Finding(
                "models", "model", "warning", f"{config.model} is not here yet: lichen pull {config.model}"
            )
            return
        summary, options = check_gguf(path), model_options(config)
        needed = memory.estimate(summary, options).total
        if needed <= free:
            detail = f"{config.model} takes {megabytes(needed)} with {options.slots} slots"
            yield Finding("models", "model", "fine", detail)
            return
        smaller = memory.fitted(config.model, summary, options, free)
        yield Finding(
            "models", "model", "warning", f"{smaller.note} Lower --context or --slots to choose yourself."
        )
    except LichenError as error:
        yield Finding("models", "model", "warning", str(error))


# ---- software -------------------------------------------------------------------------------------


def software_findings(config: Config, hardware: Hardware) -> Iterator[Finding]:
    """Python, compilers, llama.cpp and what it was compiled for, the store, the daemon."""
    yield python()
    yield toolchain()
    yield from bindings(hardware)
    yield from store(config)
    yield daemon(config)


# ---- telling --------------------------------------------------------------------------------------


def _record(hardware: Hardware, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "hardware_class": hardware.hardware_class,
        "hardware": msgspec.to_builtins(hardware),
        "findings": [finding._asdict() for finding in findings],
    }


def _show(hardware: Hardware, findings: Iterable[Finding]) -> None:
    for group, members in groupby(findings, key=lambda finding: finding.group):
        table(
            group.capitalize(),
            ("CHECK", "VERDICT", "DETAIL"),
            ((finding.what, finding.verdict, finding.detail) for finding in members),
        )
        typer.echo("")
    typer.echo(f"Hardware class: {hardware.hardware_class}")


def _binary(size: int) -> str:
    """Bytes of a cache in words."""
    return f"{size / (1 << 20):g} MB" if size >= 1 << 20 else f"{size / (1 << 10):g} KB"
