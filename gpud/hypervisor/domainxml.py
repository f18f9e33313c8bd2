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

METADATA_NAMESPACE: Final = "https://gpu.ai/xmlns/gpud/1"
"""Namespace of our ``<metadata>`` element; libvirt keeps it with the domain and gives it back."""

CHANNEL_NAME: Final = "ai.gpu.gpud.0"
"""Name of the virtio-serial port over which the guest reports to gpud."""

_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_STAND_IN_DEVICE = "edu"
_FIRST_STAND_IN_SLOT = 0x08


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
    _add(domain, "vcpu", str(spec.cpu_cores))
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
    _add_stand_ins(domain, spec.stand_ins)
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
    else:
        cpu = _add(domain, "cpu", mode="maximum")
    _add(cpu, "topology", sockets="1", cores=str(spec.cpu_cores), threads="1")


def _add_devices(domain: ET.Element, spec: DomainSpec) -> None:
    devices = _add(domain, "devices")
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


def _add_stand_ins(domain: ET.Element, count: int) -> None:
    """Add QEMU's teaching device (1234:11e8) per stand-in; libvirt has no element for it.

    Each gets a slot of the root bus well above those that libvirt gives out, counting from 1. Without
    one, QEMU 7.2 would place these first, in the very slots that libvirt has named for its own.
    """
    if not count:
        return
    domain.set("xmlns:qemu", _QEMU_NAMESPACE)
    commandline = _add(domain, "qemu:commandline")
    for number in range(count):
        _add(commandline, "qemu:arg", value="-device")
        slot = _FIRST_STAND_IN_SLOT + number
        device = f"{_STAND_IN_DEVICE},id=stand-in-{number},bus=pcie.0,addr={slot:#x}"
        _add(commandline, "qemu:arg", value=device)
