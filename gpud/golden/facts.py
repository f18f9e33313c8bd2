"""What is inside an image, as far as cloning and gpud depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

VIRTIO: Final = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console")
"""The drivers of the machine that gpud makes: its bus, disks, network, and the port of reports."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that the image may boot.

    Attributes:
        release: As ``uname -r`` says it.
        has_initramfs: Whether one lies beside it.
        missing: Those of :data:`VIRTIO` that it has not, nor as a module.
        has_nvidia: Whether NVIDIA's driver was built for it.
    """

    release: str
    has_initramfs: bool = True
    missing: tuple[str, ...] = ()
    has_nvidia: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What is inside an image.

    Attributes:
        machine_id: Content of ``/etc/machine-id``; None where there is none.
        traces: For each name of a trace, the paths of what there is of it.
        open_accounts: Users that a password lets in, an empty one too.
        unread: What could not be looked into.
        kernels: Newest last, as far as names tell.
        programs: Which of those that matter are there.
        versions: Of the packages that matter.
        cloud_init_off: Whether cloud-init is switched off.
        datasources: Where cloud-init looks for its seed; None for everywhere.
        ssh_enabled: Whether sshd starts at boot.
        uefi_loader: Whether UEFI firmware finds a boot loader without having been told of one.
        bios_loader: Whether BIOS firmware finds one.
        serial_console: Whether the kernel is told to talk on the serial port.
        root_is_last: Whether the root file system can grow to the end of a larger disk.
    """

    machine_id: str | None = ""
    traces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    open_accounts: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    programs: frozenset[str] = frozenset()
    versions: Mapping[str, str] = field(default_factory=dict)
    cloud_init_off: bool = False
    datasources: tuple[str, ...] | None = None
    ssh_enabled: bool = True
    uefi_loader: bool = True
    bios_loader: bool = True
    serial_console: bool = True
    root_is_last: bool = True
