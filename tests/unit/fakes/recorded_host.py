"""Recorded servers (tests/data/hosts) unfolded into directories that look like their /sys and /proc.

The format is told in tests/data/README.md. Links, names and texts are laid out as the kernel does it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.unit.fakes.kernel_tree import create

HOSTS: Final = Path(__file__).parents[2] / "data/hosts"

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
# Flags of a memory BAR in `resource`, as the kernel prints them for each kind (include/linux/ioport.h).
_FLAGS: Final = {"32": 0x40200, "64": 0x140204, "64p": 0x14220C}
_LINES_OF_RESOURCE: Final = 13  # six BARs, the ROM, six BARs of virtual functions
_RESOURCE_LINE: Final = "0x{:016x} 0x{:016x} 0x{:016x}\n"
_BRIDGE_CLASS: Final = 0x0604

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordedHost:
    """One server, unfolded.

    Attributes:
        root: The directory that holds its ``sys`` and ``proc``.
        nvml: What its NVML says, as the fake library reads it; None where there is no NVML.
    """

    root: Path
    nvml: Path | None

    @property
    def sysfs(self) -> Path:
        return self.root / "sys"

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    def device(self, address: str) -> Path:
        """A function's directory, through the link that the kernel has for it."""
        return self.sysfs / "bus/pci/devices" / address

    def vanish(self, address: str) -> None:
        """Pull a function out: the link is gone, and with it all that could be read through it."""
        self.device(address).unlink()


def names() -> list[str]:
    """The recorded servers."""
    return sorted(directory.name for directory in HOSTS.iterdir() if directory.is_dir())


def unfold(name: str, root: Path) -> RecordedHost:
    """Unfold a recorded server below ``root``."""
    return unfold_directory(HOSTS / name, root)


def unfold_directory(recorded: Path, root: Path) -> RecordedHost:
    """Unfold a server from wherever it was recorded to, such as one's own."""
    host = yaml.load((recorded / "host.yaml").read_text(), yaml.CSafeLoader)
    _unfold_functions(host["functions"], root / "sys")
    _unfold_nodes(host["nodes"], root / "sys/devices/system/node", root / "proc")
    for parameter in host["modules"]:
        _unfold_parameter(parameter, root / "sys/module")
    _write(root / "proc/cmdline", host["cmdline"] + "\n")
    _write(root / "proc/interrupts", "".join(_interrupts(host["interrupts"])))
    nvml = recorded / "nvml.txt"
    return RecordedHost(root, nvml if nvml.exists() else None)


def _write(file: Path, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    try:
        create(file, content)
    except FileNotFoundError:  # rare, so it is cheaper to make the directory after the fact
        file.parent.mkdir(parents=True)
        create(file, content)


def _link(link: Path, target: Path) -> None:
    """A relative link, as all of sysfs' are."""
    for directory in (target, link.parent):
        if not directory.exists():
            directory.mkdir(parents=True)
    link.symlink_to(os.path.relpath(target, link.parent))


# ---- PCI


def _unfold_functions(functions: list[Record], sysfs: Path) -> None:
    by_address = {function["at"]: function for function in functions}
    slots = [address.rpartition(".")[0] for address in by_address]
    (sysfs / "bus/pci/devices").mkdir(parents=True)
    (sysfs / "kernel/iommu_groups").mkdir(parents=True)
    _write(sysfs / "bus/pci/drivers_probe", "")
    for address, function in by_address.items():
        directory = sysfs / "devices" / _place(function, by_address)
        shared_slot = slots.count(address.rpartition(".")[0]) > 1
        for name, text in _attributes(function, shared_slot=shared_slot).items():
            _write(directory / name, text)
        _link(sysfs / "bus/pci/devices" / address, directory)
        _link(directory / "subsystem", sysfs / "bus/pci")
        _unfold_driver(function, directory, sysfs / "bus/pci/drivers")
        _unfold_group(function, directory, sysfs / "kernel/iommu_groups")


def _place(function: Record, by_address: Mapping[str, Record]) -> Path:
    """The way down to a function: host bridge, the bridges above it, itself."""
    address: str = function["at"]
    if "under" in function:
        return _place(by_address[function["under"]], by_address) / address
    return Path(f"pci{address.rpartition(':')[0]}") / address


def _attributes(function: Record, *, shared_slot: bool) -> dict[str, str | bytes]:
    vendor, device = function["ids"].split(":")
    subsystem_vendor, subsystem_device = function.get("subsystem", "0000:0000").split(":")
    texts: dict[str, str | bytes] = {
        "vendor": f"0x{vendor}\n",
        "device": f"0x{device}\n",
        "subsystem_vendor": f"0x{subsystem_vendor}\n",
        "subsystem_device": f"0x{subsystem_device}\n",
        "class": f"0x{function['class']}\n",
        "revision": f"0x{function.get('revision', '00')}\n",
        "numa_node": f"{function.get('node', -1)}\n",
        "driver_override": "(null)\n",
        "resource": "".join(_resource(function.get("bars", ()))),
        "power/control": "on\n",
        "config": _header(function, shared_slot=shared_slot),
    }
    if "resets" in function:
        texts["reset"] = ""
        texts["reset_method"] = function["resets"] + "\n"
    if function.get("power", "D0") is not None:
        texts["power_state"] = function.get("power", "D0") + "\n"
    if function.get("d3cold", True) is not None:
        texts["d3cold_allowed"] = f"{function.get('d3cold', True):d}\n"
    return texts


def _resource(bars: tuple[str, ...]) -> Iterator[str]:
    """BARs one after another, at addresses that are made up."""
    start = 0x1_0000_0000
    lines = 0
    for bar in bars:
        size, kind = bar.split("/")
        found = re.fullmatch(r"(\d+)([KMG]?)", size)
        assert found is not None, bar
        size_bytes = int(found[1]) * _UNITS[found[2]]
        start = -(-start // size_bytes) * size_bytes
        yield _RESOURCE_LINE.format(start, start + size_bytes - 1, _FLAGS[kind])
        lines += 1
        start += size_bytes
        if kind != "32":  # its upper half takes the place of the next BAR
            yield _RESOURCE_LINE.format(0, 0, 0)
            lines += 1
    yield _RESOURCE_LINE.format(0, 0, 0) * (_LINES_OF_RESOURCE - lines)


def _header(function: Record, *, shared_slot: bool) -> bytes:
    """The standard header (PCI Local Bus Specification 3.0, 6.1), as far as it tells who it is."""
    if not function.get("answers", True):
        return b"\xff" * 64
    class_code = int(function["class"], 16)
    bridge = class_code >> 8 == _BRIDGE_CLASS
    header = bytearray(64)

    def put(offset: int, number: int, size: int = 2) -> None:
        header[offset : offset + size] = number.to_bytes(size, "little")

    for offset, number in zip((0x00, 0x02), function["ids"].split(":"), strict=True):
        put(offset, int(number, 16))
    put(0x04, 0x0406)  # memory and bus mastering on, INTx off
    put(0x06, 0x0010)  # has a list of capabilities
    put(0x08, int(function.get("revision", "00"), 16), 1)
    put(0x09, class_code, 3)
    put(0x0E, bridge | shared_slot << 7, 1)
    if not bridge:
        subsystem = function.get("subsystem", "0000:0000").split(":")
        for offset, number in zip((0x2C, 0x2E), subsystem, strict=True):
            put(offset, int(number, 16))
    return bytes(header)


def _unfold_driver(function: Record, directory: Path, drivers: Path) -> None:
    if "driver" not in function:
        return
    driver = drivers / function["driver"]
    _link(directory / "driver", driver)
    _link(driver / function["at"], directory)
    _write(driver / "bind", "")
    _write(driver / "unbind", "")


def _unfold_group(function: Record, directory: Path, groups: Path) -> None:
    if "group" not in function:
        return
    group = groups / str(function["group"])
    _link(directory / "iommu_group", group)
    _link(group / "devices" / function["at"], directory)
    _write(group / "type", "identity\n")


# ---- the rest


def _unfold_nodes(nodes: list[Record], directory: Path, proc: Path) -> None:
    for node in nodes:
        _unfold_node(node, directory / f"node{node['node']}")
    numbers = ",".join(str(node["node"]) for node in nodes)
    for name in ("possible", "online", "has_cpu", "has_memory"):
        _write(directory / name, numbers + "\n")
    cpus = sorted(cpu for node in nodes for cpu in _cpus(node))
    busy = "100 0 100 1000 0 0 0 0 0 0\n"
    _write(proc / "stat", f"cpu  {busy}" + "".join(f"cpu{cpu} {busy}" for cpu in cpus))
    _write(proc / "meminfo", "".join(f"{key}: {kib:8d} kB\n" for key, kib in _meminfo(nodes)))


def _cpus(node: Record) -> list[int]:
    ranges = [part.partition("-") for part in node["cpus"].split(",")]
    return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]


def _meminfo(nodes: list[Record]) -> list[tuple[str, int]]:
    pools = [size * pages for node in nodes for size, pages in node["hugepages"].items()]
    total = sum(node["memory_kib"] for node in nodes)
    return [("MemTotal", total), ("MemFree", total - sum(pools)), ("Hugetlb", sum(pools))]


def _unfold_node(node: Record, directory: Path) -> None:
    number = node["node"]
    free = node["memory_kib"] - sum(size * pages for size, pages in node["hugepages"].items())
    meminfo = {"MemTotal": node["memory_kib"], "MemFree": free}
    _write(directory / "cpulist", node["cpus"] + "\n")
    _write(directory / "cpumap", _cpumap(_cpus(node)) + "\n")
    _write(
        directory / "meminfo",
        "".join(f"Node {number} {key + ':':16}{kib:8d} kB\n" for key, kib in meminfo.items()),
    )
    for size, pages in node["hugepages"].items():
        pool = directory / f"hugepages/hugepages-{size}kB"
        _write(pool / "nr_hugepages", f"{pages}\n")
        _write(pool / "free_hugepages", f"{pages}\n")


def _cpumap(cpus: list[int]) -> str:
    """32 CPUs a word, the highest first."""
    mask = sum(1 << cpu for cpu in cpus)
    words = range(max(cpus) // 32, -1, -1)
    return ",".join(f"{mask >> 32 * word & 0xFFFFFFFF:08x}" for word in words)


def _unfold_parameter(told: str, modules: Path) -> None:
    name, _, value = told.partition("=")
    module, _, parameter = name.partition(".")
    _write(modules / module / "parameters" / parameter, value + "\n")


def _interrupts(chips: list[str]) -> Iterator[str]:
    yield "            CPU0       CPU1       \n"
    for number, chip in enumerate(chips, start=120):
        yield f"{number:4d}:          0      12345 {chip} {number * 4096}-edge      a device\n"
    yield " NMI:          0          0   Non-maskable interrupts\n"
