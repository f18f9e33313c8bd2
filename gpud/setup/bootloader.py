"""How the kernel's command line is changed for good, as far as that is known for sure."""

from __future__ import annotations

import re
from typing import Final

from gpud.setup.change import MARK, Change, Item, by_hand, fine
from gpud.setup.parts import TextFile
from gpud.setup.server import Server

DROP_IN: Final = "/etc/default/grub.d/50-gpud.cfg"
"""Debian's and Ubuntu's ``grub-mkconfig`` reads such files after ``/etc/default/grub``."""
GRUB_CONFIG: Final = "/boot/grub/grub.cfg"
_UPDATE_GRUB: Final = "update-grub"
_LOADER: Final = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""Where a boot loader leaves its name (https://systemd.io/BOOT_LOADER_INTERFACE)."""
_LINE: Final = re.compile(r'^GRUB_CMDLINE_LINUX_DEFAULT="\$\w+ (.*)"$', re.MULTILINE)


def arguments_of_ours(server: Server) -> tuple[str, ...]:
    """What our drop-in file gives the kernel; nothing where there is none."""
    found = _LINE.search(server.text(DROP_IN))
    return tuple(found[1].split()) if found is not None else ()


def is_systemd_boot(server: Server) -> bool:
    """Whether systemd-boot started this boot."""
    # Four bytes of attributes, then UTF-16 (Linux: Documentation/filesystems/efivarfs.rst).
    return "systemd-boot" in server.text(_LOADER).replace("\0", "")


def is_grub(server: Server) -> bool:
    """Whether Debian's or Ubuntu's GRUB makes the command line."""
    made_here = server.exists(GRUB_CONFIG) and server.exists(f"/usr/sbin/{_UPDATE_GRUB}")
    return made_here and not is_systemd_boot(server)


def boot_with(
    server: Server, arguments: tuple[str, ...], present: tuple[str, ...], why: str
) -> Change | Item:
    """Have Linux booted with arguments.

    They go to the ordinary entries of GRUB's menu only: the recovery entries are a way out.

    Args:
        server: The host.
        arguments: What to add, in order.
        present: What this boot was given.
        why: What needs them.
    """
    line = " ".join(arguments)
    what = f"boot Linux with {line}"
    if is_grub(server):
        content = f'{MARK}GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {line}"\n'
        return Change(
            name="kernel arguments",
            what=what,
            why=why,
            undo=f"rm {DROP_IN} && {_UPDATE_GRUB}, and a reboot",
            parts=(TextFile(DROP_IN, content),),
            after=(_UPDATE_GRUB,),
            after_undo=(_UPDATE_GRUB,),
            proof=(GRUB_CONFIG, line),
            at_boot=f"the kernel takes {line} at its start only",
            in_force=set(arguments) <= set(present),
        )
    missing = [one for one in arguments if one not in present]
    if not missing:
        return fine("kernel arguments", f"booted with {line}")
    return by_hand("kernel arguments", f"{what}: {why}", _recipe(server, missing))


def _recipe(server: Server, missing: list[str]) -> str:
    line = " ".join(missing)
    if is_systemd_boot(server):
        return (
            f"systemd-boot starts this server: put its whole command line and {line} as one line into"
            " /etc/kernel/cmdline, which without it is that of /proc/cmdline less initrd= and"
            " BOOT_IMAGE=; then dpkg-reconfigure linux-image-$(uname -r), and reboot"
        )
    return (
        f"this server's boot loader is not known: add {line} to the kernel's command line in its"
        " configuration, and reboot"
    )
