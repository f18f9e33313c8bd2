"""Who may use what: the daemon libvirt, QEMU the kernel's hypervisor."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final

from gpud.setup.change import MARK, Change, Item, by_hand, fine
from gpud.setup.parts import Member, TextFile
from gpud.setup.server import Server

RULE: Final = "/etc/udev/rules.d/99-gpud-kvm.rules"
_DAEMON: Final = ("gpud", "libvirt")
_QEMU: Final = ("libvirt-qemu", "kvm")
"""Who QEMU runs as where Debian or Ubuntu made the package, and whose ``/dev/kvm`` is."""
_KVM: Final = "/dev/kvm"
_OF_GROUP: Final = stat.S_IRGRP | stat.S_IWGRP
_OF_ALL: Final = stat.S_IROTH | stat.S_IWOTH
_TRIGGER: Final = ("udevadm control --reload", "udevadm trigger --action=change --name-match=kvm")


def access(server: Server) -> Iterator[Change | Item]:
    """Memberships, and the mode of ``/dev/kvm``."""
    yield from _membership(
        server, *_DAEMON, "the daemon reaches libvirt's socket as its group does"
    )
    yield from _membership(server, *_QEMU, "QEMU opens /dev/kvm as its group does")
    if server.exists(_KVM):
        yield from _kvm(server)


def _membership(server: Server, user: str, group: str, why: str) -> Iterator[Change | Item]:
    name = f"access of {user}"
    users, groups = _ids(server, "/etc/passwd", 3), _ids(server, "/etc/group", 2)
    if user not in users or group not in groups:
        missing = f"user {user}" if user not in users else f"group {group}"
        package = "gpud's package or systemd-sysusers" if user == _DAEMON[0] else "its package"
        mend = f"{package} makes it" if user not in users else "apt install libvirt-daemon-system"
        yield by_hand(name, f"there is no {missing}", mend)
    elif users[user] == groups[group]:
        yield fine(name, f"{user} has {group} for its own group")
    else:
        yield Change(
            name=name,
            what=f"add {user} to the group {group}",
            why=f"{why}; who runs already gets it with its next start",
            undo=f"gpasswd -d {user} {group}",
            parts=(Member(user, group),),
        )


def _ids(server: Server, path: str, field: int) -> dict[str, str]:
    """Group ids by name: field 3 of ``/etc/passwd``, field 2 of ``/etc/group``."""
    lines = (line.split(":") for line in server.text(path).splitlines())
    return {line[0]: line[field] for line in lines if len(line) > field}


def _kvm(server: Server) -> Iterator[Change | Item]:
    found = server.at(_KVM).stat()
    mode = stat.S_IMODE(found.st_mode)
    group = _ids(server, "/etc/group", 2).get(_QEMU[1])
    lets_in = (str(found.st_gid) == group and mode & _OF_GROUP == _OF_GROUP) or (
        mode & _OF_ALL == _OF_ALL
    )
    if group is None or (lets_in and not server.exists(RULE)):
        yield fine(_KVM, f"{mode:04o}")
        return
    yield Change(
        name=_KVM,
        what="give it to group kvm, mode 0660",
        why="QEMU is not root, and libvirt asks it everything anew where it finds /dev/kvm closed",
        undo=f"rm {RULE} && {' && '.join(_TRIGGER)}",
        parts=(TextFile(RULE, f'{MARK}KERNEL=="kvm", GROUP="kvm", MODE="0660"\n'),),
        after=_TRIGGER,
        after_undo=_TRIGGER,
        in_force=lets_in,
    )
