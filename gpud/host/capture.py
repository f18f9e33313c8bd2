"""Records what this host tells of its GPUs, so that it can be replayed elsewhere and shown to others.

The files are those that ``tests/data/README.md`` describes. What tells one machine from another of its
kind is not in them: UUIDs and serials are invented anew, of the kernel's arguments only those are
kept that matter here, MAC addresses and processes are not read at all. No privilege is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gpud.host import pci
from gpud.host.nvml import NvmlGpu, NvmlReport
from gpud.host.pci import Bar, PciFunction, PciTree
from gpud.host.sysfs import CONFIG_HEADER_BYTES, attribute
from gpud.model import PciAddress

HOST_FILE: Final = "host.yaml"
NVML_FILE: Final = "nvml.txt"

_HEADING: Final = (
    "# Recorded on a server; serials and UUIDs are invented, MAC addresses are left out."
)

_ARGUMENTS: Final = frozenset(
    {
        *("intel_iommu", "amd_iommu", "iommu", "iommu.passthrough", "iommu.strict"),
        *("pci", "pcie_acs_override", "pcie_aspm", "pcie_port_pm"),
        *("vfio-pci.ids", "vfio_pci.ids", "vfio-pci.disable_idle_d3", "vfio_pci.disable_idle_d3"),
        *("vfio_iommu_type1.allow_unsafe_interrupts", "iommufd.allow_unsafe_interrupts"),
        *("module_blacklist", "modprobe.blacklist", "rd.driver.blacklist", "rd.driver.pre"),
        *("default_hugepagesz", "hugepagesz", "hugepages", "hugetlb_free_vmemmap"),
        *("isolcpus", "nohz_full", "rcu_nocbs", "mem_encrypt", "kvm.ignore_msrs"),
    }
)
"""Arguments of the kernel that are kept; others can hold host names, keys, addresses of disks."""

_PARAMETERS: Final = (
    "vfio_iommu_type1.allow_unsafe_interrupts",
    "iommufd.allow_unsafe_interrupts",
    "vfio_pci.disable_idle_d3",
)

_CHIP: Final = re.compile(r"^ *\d+:[ 0-9]* ([A-Za-z][\w-]*?)(?:-[0-9a-f]{4,8}:\S*)? ", re.MULTILINE)
"""The chip of a line in ``/proc/interrupts``, less the device that newer kernels name with it."""
_MEMORY: Final = re.compile(r"MemTotal: +(\d+) kB")
_NODE: Final = re.compile(r"node(\d+)")
_POOL: Final = re.compile(r"hugepages-(\d+)kB")

_UNITS: Final = (("G", 2**30), ("M", 2**20), ("K", 2**10))


def capture(sysfs: Path, proc: Path, report: NvmlReport) -> dict[str, str]:
    """Record a host.

    Args:
        sysfs: Where sysfs is.
        proc: Where procfs is.
        report: What NVML says of the same host; what it calls its problem is not recorded.

    Returns:
        Each file's text by its name; none for NVML where it knows no card.
    """
    tree = _read(sysfs)
    files = {HOST_FILE: "\n".join((_HEADING, *_host(sysfs, proc, tree))) + "\n"}
    if report.gpus:
        files[NVML_FILE] = "\n".join((_HEADING, *_nvml(report, tree))) + "\n"
    return files


def _read(sysfs: Path) -> PciTree:
    """The PCI functions, each of which is asked whether it answers.

    That waits while a function is being reset, here as in any program that looks at PCI.
    """
    tree = pci.read(sysfs)
    return tree.with_headers({one: _header(sysfs, one) for one in tree.functions})


def _header(sysfs: Path, address: PciAddress) -> bytes:
    try:
        with (sysfs / attribute(address, "config")).open("rb", buffering=0) as config:
            return config.read(CONFIG_HEADER_BYTES)
    except OSError:
        return b""


def _host(sysfs: Path, proc: Path, tree: PciTree) -> Iterator[str]:
    arguments = [one for one in _text(proc / "cmdline").split() if one.split("=")[0] in _ARGUMENTS]
    chips = sorted(set(_CHIP.findall(_text(proc / "interrupts"))))
    yield f"cmdline: {json.dumps(' '.join(arguments))}"
    yield f"interrupts: {json.dumps(chips)}"
    yield f"modules: {json.dumps(_parameters(sysfs / 'module'))}"
    yield "nodes:"
    yield from _nodes(sysfs / "devices/system/node")
    yield "functions:"
    for function in tree.functions.values():
        yield _line(_function(function))


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _line(entry: Mapping[str, object]) -> str:
    """An entry of a YAML list, on a line of its own; what JSON writes is YAML too."""
    return "- {" + ", ".join(f"{key}: {json.dumps(told)}" for key, told in entry.items()) + "}"


def _parameters(modules: Path) -> list[str]:
    told = {
        name: _text(modules / name.replace(".", "/parameters/")).strip() for name in _PARAMETERS
    }
    return [f"{name}={value}" for name, value in told.items() if value]


def _nodes(directory: Path) -> Iterator[str]:
    numbered = {int(found[1]): node for found, node in _matches(directory, _NODE)}
    for number, node in sorted(numbered.items()):
        pools = {
            int(found[1]): _text(pool / "nr_hugepages").strip()
            for found, pool in _matches(node / "hugepages", _POOL)
        }
        pages = ", ".join(f"{size}: {count}" for size, count in sorted(pools.items()))
        memory = _MEMORY.search(_text(node / "meminfo"))
        yield (
            f'- {{node: {number}, cpus: "{_text(node / "cpulist").strip()}",'
            f" memory_kib: {memory[1] if memory else 0}, hugepages: {{{pages}}}}}"
        )


def _matches(directory: Path, name: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Path]]:
    for entry in directory.glob("*"):
        found = name.fullmatch(entry.name)
        if found is not None:
            yield found, entry


def _function(function: PciFunction) -> dict[str, object]:
    """What differs from the usual; the address comes first, as the eye looks for it."""
    subsystem = f"{function.subsystem_vendor:04x}:{function.subsystem_device:04x}"
    usual: list[tuple[str, object, object]] = [
        ("under", str(function.upstream[-1]) if function.upstream else None, None),
        ("ids", function.ids, None),
        ("subsystem", subsystem, "0000:0000"),
        ("class", f"{function.class_code:06x}", None),
        ("revision", f"{function.revision:02x}", "00"),
        ("driver", function.driver, None),
        ("group", function.iommu_group, None),
        ("node", function.numa_node, None),
        ("bars", [_bar(bar) for bar in function.bars], []),
        ("resets", " ".join(function.reset_methods), ""),
        ("power", function.power_state, "D0"),
        ("d3cold", function.d3cold_allowed, True),
        ("answers", function.answers, True),
    ]
    return {"at": str(function.address)} | {
        key: told for key, told, default in usual if told != default
    }


def _bar(bar: Bar) -> str:
    """``128G/64p``: size, width of its address, and whether it is prefetchable."""
    unit, unit_bytes = next(
        ((name, unit) for name, unit in _UNITS if bar.size_bytes % unit == 0), ("", 1)
    )
    width = f"{64 if bar.is_64bit else 32}{'p' if bar.prefetchable else ''}"
    return f"{bar.size_bytes // unit_bytes}{unit}/{width}"


def _nvml(report: NvmlReport, tree: PciTree) -> Iterator[str]:
    switches = [str(one.address) for one in tree.functions.values() if one.is_nvswitch]
    yield f"driver_version {report.driver_version}"
    for number, gpu in enumerate(report.gpus, start=1):
        yield ""
        yield f"card {gpu.address}"
        yield from (f"    {key} {told}" for key, told in _card(gpu, number) if told is not None)
        for link, end in enumerate(_links(gpu, switches)):
            yield f"    nvlink {link} {end}"
        if gpu.fault is not None:
            # At a question that comes late, so that the replayed card is still known by name.
            yield f"    # {gpu.fault}"
            yield "    fail nvmlDeviceGetPowerUsage GPU_IS_LOST"


def _card(gpu: NvmlGpu, number: int) -> Iterator[tuple[str, object]]:
    yield "ids", gpu.pci_ids
    yield "subsystem", gpu.subsystem_ids
    yield "name", gpu.name
    yield "uuid", gpu.uuid and f"GPU-00000000-0000-4000-8000-{number:012x}"
    yield "serial", gpu.serial and f"165{number:010d}"
    yield "minor", gpu.minor
    yield "vbios", gpu.vbios
    yield "inforom", gpu.inforom
    yield "memory_mib", gpu.vram_mib
    yield "memory_used_mib", gpu.memory_used_mib
    yield "persistence", None if gpu.persistence is None else int(gpu.persistence)
    yield "temperature_c", gpu.temperature_c
    yield "power_mw", None if gpu.power_w is None else gpu.power_w * 1000
    yield "mig", "1 1" if gpu.mig_enabled else None
    yield "ecc", "1 0" if gpu.ecc_pending else None
    yield "ecc_uncorrected", _ecc_uncorrected(gpu)
    yield "retired_pages", None if gpu.retired_pages is None else f"0 {gpu.retired_pages}"
    yield "retirement_pending", 1 if gpu.retirement_pending else None
    if gpu.remap_pending or gpu.remap_failed:
        yield "remapped_rows", f"0 0 {gpu.remap_pending:d} {gpu.remap_failed:d}"


def _ecc_uncorrected(gpu: NvmlGpu) -> str | None:
    """Counts since the last reset and over the card's life; a card has both or none."""
    if gpu.ecc_uncorrected is None:
        return None
    return f"{gpu.ecc_uncorrected} {gpu.ecc_uncorrected_lifetime or 0}"


def _links(gpu: NvmlGpu, switches: list[str]) -> list[str]:
    """One NVLink to each thing at the other end: how many there are, NVML's report does not keep."""
    if gpu.nvswitch:
        return [f"switch {switch}" for switch in switches]
    return [f"gpu {peer}" for peer in gpu.nvlink_peers]
