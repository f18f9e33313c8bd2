"""A guest as libvirt domain XML. Pure: the same specification always gives the same text.

Every element is there for a reason told beside it; the vocabulary is libvirt's domain format
(https://libvirt.org/formatdomain.html). What is left out is left out on purpose: no display, no USB,
no tablet, no memory balloon, because nothing in a rented GPU server guest would use them.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from xml.etree import ElementTree as ET

from gpud.hypervisor.passthroughxml import add_functions
from gpud.model import PciAddress

METADATA_NAMESPACE: Final = "https://gpu.ai/xmlns/gpud/1"
"""Namespace of our ``<metadata>`` element; libvirt keeps it with the domain and gives it back."""

CHANNEL_NAME: Final = "ai.gpu.gpud.0"
"""Name of the virtio-serial port over which the guest reports to gpud."""

_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_STAND_IN_DEVICE = "edu"
_FIRST_STAND_IN_SLOT = 0x08
_MOST_ALLOCATION_THREADS = 16


@dataclass(frozen=True, slots=True)
class UserNetwork:
    """QEMU's own NAT (slirp): needs no privilege, and nobody can reach in."""


@dataclass(frozen=True, slots=True)
class LibvirtNetwork:
    """A virtual network that libvirt runs.

    Attributes:
        name: Name of the network.
    """

    name: str


@dataclass(frozen=True, slots=True)
class PassedCard:
    """A card of the host that the guest gets whole.

    Attributes:
        functions: Every PCI function that goes with it, all bound to vfio-pci. Those of other slots,
            such as NVSwitches, may be among them; cards may share some.
    """

    functions: tuple[PciAddress, ...]


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """Everything that decides how a guest's virtual machine is built.

    Attributes:
        name: Name of the domain.
        uuid: UUID of the domain.
        owner: Which gpud (which state directory) the domain belongs to; kept in its metadata.
        upstream_id: The instance it runs; kept in its metadata.
        mac: MAC address of the guest's only NIC.
        memory_mib: Guest memory, in MiB.
        cpu_cores: vCPUs, shown to the guest as cores of one socket.
        domain_type: ``kvm``, or ``qemu`` for emulation where the CPU cannot virtualise.
        firmware: ``uefi`` (without Secure Boot, so that unsigned drivers load) or ``bios``.
        base: The qcow2 image that ``disk`` is an overlay of; shared, and never written.
        disk: The root disk, qcow2.
        seed: The cloud-init seed, an ISO image.
        nvram: Where the UEFI variables are kept; unused with ``bios``.
        network: What the NIC is plugged into.
        stand_ins: How many emulated devices the guest gets in place of GPUs (development only).
        cards: The cards that the guest gets.
        rombar: Whether the guest sees the cards' option ROMs.
        mmio_window_mib: 64-bit address space that OVMF sets aside for the cards' BARs; None leaves it
            to OVMF. Unused with ``bios``.
        cpuset: CPUs of the host to run on, such as ``0-31,64-95``; None for any.
        nodeset: NUMA nodes of the host to take memory from, such as ``0`` or ``0-1``; None for any.
        hugepage_kib: Size of the hugepages that the guest's memory is made of; None for ordinary pages.
    """

    name: str
    uuid: uuid.UUID
    owner: str
    upstream_id: str
    mac: str
    memory_mib: int
    cpu_cores: int
    domain_type: Literal["kvm", "qemu"]
    firmware: Literal["uefi", "bios"]
    base: Path
    disk: Path
    seed: Path
    nvram: Path
    network: UserNetwork | LibvirtNetwork
    stand_ins: int = 0
    cards: tuple[PassedCard, ...] = ()
    rombar: bool = False
    mmio_window_mib: int | None = None
    cpuset: str | None = None
    nodeset: str | None = None
    hugepage_kib: int | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose domain it is, as its metadata tells.

    Attributes:
        owner: The gpud that made it.
        upstream_id: The instance it runs.
    """

    owner: str
    upstream_id: str


def render(spec: DomainSpec) -> str:
    """Give the domain XML of ``spec``, indented, ready for ``virDomainCreateXML``."""
    domain = ET.Element("domain", {"type": spec.domain_type})
    _add(domain, "name", spec.name)
    _add(domain, "uuid", str(spec.uuid))
    _add_metadata(domain, spec)
    _add(domain, "memory", str(spec.memory_mib), unit="MiB")
    _add_memory_backing(domain, spec)
    _add_vcpus(domain, spec)
    _add_numa_policy(domain, spec.nodeset)
    _add_os(domain, spec)
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "apic")
    _add_cpu(domain, spec)
    _add(domain, "clock", offset="utc")
    # A guest that ends must be seen to end: gpud decides whether it is started again.
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    _add(domain, "on_crash", "destroy")
    _add_devices(domain, spec)
    _add_qemu_arguments(domain, spec)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def identify(xml: str) -> Identity | None:
    """Read whose domain ``xml`` is, from a whole domain or from our metadata element alone.

    Returns:
        None for a domain that no gpud made.
    """
    tag = f"{{{METADATA_NAMESPACE}}}instance"
    root = ET.fromstring(xml)  # noqa: S314 - written by libvirt or by render(), not by strangers
    # libvirt returns the element alone without its namespace declaration's prefix.
    found = root if root.tag in {tag, "instance"} else root.find(f"metadata/{tag}")
    if found is None:
        return None
    return Identity(found.get("owner", ""), found.get("upstream_id", ""))


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    child.text = text
    return child


def _add_metadata(domain: ET.Element, spec: DomainSpec) -> None:
    metadata = _add(domain, "metadata")
    ET.SubElement(
        metadata,
        "gpud:instance",
        {
            "xmlns:gpud": METADATA_NAMESPACE,
            "owner": spec.owner,
            "upstream_id": spec.upstream_id,
        },
    )


def _add_memory_backing(domain: ET.Element, spec: DomainSpec) -> None:
    if not spec.cards and spec.hugepage_kib is None:
        return
    backing = _add(domain, "memoryBacking")
    if spec.hugepage_kib is not None:
        pages = _add(backing, "hugepages")
        _add(pages, "page", size=str(spec.hugepage_kib), unit="KiB")
    # VFIO will pin all of it, and would find and zero each page on a single thread. Neither <locked/>
    # nor <nosharepages/>: what is pinned is not swapped, and nobody else's pages are merged with it.
    threads = min(spec.cpu_cores, _MOST_ALLOCATION_THREADS)
    _add(backing, "allocation", mode="immediate", threads=str(threads))


def _add_vcpus(domain: ET.Element, spec: DomainSpec) -> None:
    # The set holds for each vCPU and for QEMU's own threads alike. Any vCPU may run on any of them:
    # cores are claimed by number, not by name, and the kernel knows best which one is idle.
    placement = {} if spec.cpuset is None else {"cpuset": spec.cpuset}
    _add(domain, "vcpu", str(spec.cpu_cores), **placement)


def _add_numa_policy(domain: ET.Element, nodeset: str | None) -> None:
    """Say where memory comes from.

    From one node it is strict: a guest that does not fit fails at its start, and does not run slowly for
    ever. Over several it is spread evenly: strict would fill the first to the brim, and leave nothing
    of it for the next guest that was promised a part.
    """
    if nodeset is None:
        return
    mode = "strict" if nodeset.isdecimal() else "interleave"
    _add(_add(domain, "numatune"), "memory", mode=mode, nodeset=nodeset)


def _add_os(domain: ET.Element, spec: DomainSpec) -> None:
    # libvirt picks the OVMF build that has these features from the host's firmware descriptors.
    attributes = {"firmware": "efi"} if spec.firmware == "uefi" else {}
    os = ET.SubElement(domain, "os", attributes)
    _add(os, "type", "hvm", arch="x86_64", machine="q35")
    if spec.firmware == "uefi":
        firmware = _add(os, "firmware")
        _add(firmware, "feature", enabled="no", name="enrolled-keys")
        _add(firmware, "feature", enabled="no", name="secure-boot")
        _add(os, "nvram", str(spec.nvram))
    else:
        # SeaBIOS has no other way to be seen: there is no display.
        _add(os, "bios", useserial="yes")


def _add_cpu(domain: ET.Element, spec: DomainSpec) -> None:
    if spec.domain_type == "kvm":
        # Guests never migrate, so they get everything that the host's CPU can do.
        cpu = _add(domain, "cpu", mode="host-passthrough", check="none", migratable="off")
        # All of its address bits, said outright: 40 of them, which most CPU models of QEMU's have, end
        # at 1 TiB, and memory and the cards' BARs do not fit below that.
        _add(cpu, "maxphysaddr", mode="passthrough")
    else:
        cpu = _add(domain, "cpu", mode="maximum")
    _add(cpu, "topology", sockets="1", cores=str(spec.cpu_cores), threads="1")


def _add_devices(domain: ET.Element, spec: DomainSpec) -> None:
    devices = _add(domain, "devices")
    functions = [function for card in spec.cards for function in card.functions]
    add_functions(devices, functions, rombar=spec.rombar)
    _add_root_disk(devices, spec)
    _add_seed(devices, spec.seed)
    _add_nic(devices, spec)
    _add_ports(devices)
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")
    # A kernel panic ends the domain (on_crash) instead of leaving a dead guest that looks alive.
    _add(devices, "panic", model="isa")
    # libvirt would add both by itself.
    _add(devices, "controller", type="usb", model="none")
    _add(devices, "memballoon", model="none")


def _add_root_disk(devices: ET.Element, spec: DomainSpec) -> None:
    disk = _add(devices, "disk", type="file", device="disk")
    # cache=none: a tenant that writes fast fills its own queue, not the host's page cache, whose
    # writeback would stall every other guest. Asks for a file system that knows O_DIRECT.
    # io=threads: with io=native, growing a sparse file blocks QEMU's main loop.
    # discard=unmap: space that the guest trims goes back to the host.
    _add(disk, "driver", name="qemu", type="qcow2", cache="none", io="threads", discard="unmap")
    _add(disk, "source", file=str(spec.disk))
    # libvirt hands every file of a chain to QEMU's user, unless told not to. The base is everybody's.
    backing = _add(disk, "backingStore", type="file")
    _add(backing, "format", type="qcow2")
    source = _add(backing, "source", file=str(spec.base))
    _add(source, "seclabel", model="dac", relabel="no")
    _add(backing, "backingStore")
    _add(disk, "target", dev="vda", bus="virtio")
    _add(disk, "boot", order="1")


def _add_seed(devices: ET.Element, path: Path) -> None:
    # A virtio disk like the root disk, not a CD-ROM: cloud kernels (Debian's, for one) have no driver
    # for AHCI, and cloud-init looks for the label on any block device.
    seed = _add(devices, "disk", type="file", device="disk")
    _add(seed, "driver", name="qemu", type="raw")
    _add(seed, "source", file=str(path))
    _add(seed, "target", dev="vdb", bus="virtio")
    _add(seed, "readonly")


def _add_nic(devices: ET.Element, spec: DomainSpec) -> None:
    if isinstance(spec.network, LibvirtNetwork):
        interface = _add(devices, "interface", type="network")
        _add(interface, "source", network=spec.network.name)
    else:
        interface = _add(devices, "interface", type="user")
    _add(interface, "mac", address=spec.mac)
    _add(interface, "model", type="virtio")
    # No option ROM: the guest boots from its disk, never from the network.
    _add(interface, "rom", enabled="no")


def _add_ports(devices: ET.Element) -> None:
    serial = _add(devices, "serial", type="pty")
    _add(serial, "target", type="isa-serial", port="0")
    console = _add(devices, "console", type="pty")
    _add(console, "target", type="serial", port="0")
    channel = _add(devices, "channel", type="unix")
    _add(channel, "target", type="virtio", name=CHANNEL_NAME)


def _add_qemu_arguments(domain: ET.Element, spec: DomainSpec) -> None:
    """Add what libvirt has no element for."""
    arguments = [*_mmio_window(spec), *_stand_ins(spec.stand_ins)]
    if not arguments:
        return
    domain.set("xmlns:qemu", _QEMU_NAMESPACE)
    commandline = _add(domain, "qemu:commandline")
    for argument in arguments:
        _add(commandline, "qemu:arg", value=argument)


def _mmio_window(spec: DomainSpec) -> list[str]:
    # libvirt's own <sysinfo type="fwcfg"> refuses every name that begins with opt/ovmf.
    if spec.mmio_window_mib is None or spec.firmware != "uefi":
        return []
    return ["-fw_cfg", f"name=opt/ovmf/X-PciMmio64Mb,string={spec.mmio_window_mib}"]


def _stand_ins(count: int) -> list[str]:
    """QEMU's teaching device (1234:11e8) per stand-in.

    Each gets a slot of the root bus well above those that libvirt gives out, counting from 1. Without
    one, QEMU 7.2 would place these first, in the very slots that libvirt has named for its own.
    """
    arguments = []
    for number in range(count):
        slot = _FIRST_STAND_IN_SLOT + number
        device = f"{_STAND_IN_DEVICE},id=stand-in-{number},bus=pcie.0,addr={slot:#x}"
        arguments += ["-device", device]
    return arguments
