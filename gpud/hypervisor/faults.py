"""libvirt's errors in our words."""

from __future__ import annotations

import errno
from typing import Final

import libvirt

from gpud.errors import Code, GpudError

RETRY_AFTER_S: Final = 5

_CONNECTION_DOMAINS = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})
_CONNECTION_CODES = frozenset(
    {libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_RPC}
)
_LOGIN_CODES = frozenset(
    {
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
        libvirt.VIR_ERR_ACCESS_DENIED,
    }
)
_LOGIN_HINT = "gpud's user must be in the group libvirt"
_DAEMON_HINT = "is libvirtd running? gpud keeps trying"

_HINTS: Final = (
    ("already exists with uuid", "a domain that is not gpud's has that name: remove or rename it"),
    ("o_direct", "state_dir must lie on a file system that knows O_DIRECT, such as ext4 or XFS"),
    ("kvm", "/dev/kvm must be 0660 root:kvm, and virtualisation enabled in the host's firmware"),
    (
        "permission denied",
        "QEMU's user must be able to enter every directory above the file; see AppArmor's log too",
    ),
    ("unable to find any firmware", "install OVMF (package ovmf), or set guest.firmware to bios"),
    ('"write" lock', "another process, perhaps an orphaned QEMU, has the file open"),
    ("virtlogd-sock", "libvirtd runs, virtlogd does not: systemctl start virtlogd.socket"),
    ("network not found", "gpud makes its network when it starts: restart it"),
    (
        "already in use by interface",
        "the host has that subnet itself: choose another network.subnet",
    ),
)
"""What to look at first, by words (lower case) of libvirt's message."""


def code_of(error: libvirt.libvirtError) -> int:
    """Give libvirt's error code (``VIR_ERR_*``), -1 for an error without one."""
    code = error.get_error_code()
    return -1 if code is None else code


def connection_lost(error: libvirt.libvirtError) -> bool:
    """Tell whether ``error`` says that the daemon cannot be reached, rather than what it answered.

    libvirt reports a broken socket as an internal or system error; only the part of libvirt that
    raised it (RPC, remote driver) tells it from the same codes out of a hypervisor driver.
    """
    return error.get_error_domain() in _CONNECTION_DOMAINS or code_of(error) in _CONNECTION_CODES


def translate(error: libvirt.libvirtError, what: str, code: Code) -> GpudError:
    """Tell ``error`` as a :class:`GpudError`.

    Args:
        error: What libvirt raised.
        what: What gpud was about to do, to which thing: ``start guest gpud-i-…``.
        code: The code for a failure that is not the connection's.
    """
    if code_of(error) in _LOGIN_CODES:
        return unavailable(f"libvirt refuses to {what}: {error}", _LOGIN_HINT)
    if connection_lost(error):
        hint = _LOGIN_HINT if "Permission denied" in str(error) else _hint(str(error))
        return unavailable(f"cannot reach libvirt to {what}: {error}", hint or _DAEMON_HINT)
    return GpudError(
        code, f"cannot {what}: {error}", hint=_hint(str(error)), transient=_passes_by_itself(error)
    )


def unavailable(detail: str, hint: str = _DAEMON_HINT) -> GpudError:
    """Make the error of a hypervisor that is away for now."""
    return GpudError(Code.HYPERVISOR_UNAVAILABLE, detail, hint=hint, retry_after_s=RETRY_AFTER_S)


def _hint(message: str) -> str:
    return next((hint for words, hint in _HINTS if words in message.lower()), "")


def _passes_by_itself(error: libvirt.libvirtError) -> bool:
    # Another job holds the domain, or its process has not died yet (stuck in the kernel, say).
    if code_of(error) == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return True
    system_error: bool = code_of(error) == libvirt.VIR_ERR_SYSTEM_ERROR
    return system_error and error.get_int1() == errno.EBUSY
