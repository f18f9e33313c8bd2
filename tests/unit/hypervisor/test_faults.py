from __future__ import annotations

import errno
from collections.abc import Callable

import libvirt
import pytest

from gpud.errors import Code
from gpud.hypervisor.faults import code_of, connection_lost, translate

MakeError = Callable[..., libvirt.libvirtError]


@pytest.mark.parametrize(
    ("message", "code", "domain"),
    [
        ("client socket is closed", libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC),
        ("Cannot write data: Broken pipe", libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC),
        ("unable to connect", libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_FROM_NONE),
        ("invalid connection pointer in x", libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_FROM_NONE),
    ],
)
def test_broken_connection_is_told_as_passing(
    libvirt_error: MakeError, message: str, code: int, domain: int
) -> None:
    error = libvirt_error(message, code, domain)
    assert connection_lost(error)
    told = translate(error, "stop guest x", Code.GUEST_FAILED)
    assert told.code is Code.HYPERVISOR_UNAVAILABLE
    assert told.transient
    assert told.retry_after_s
    assert "stop guest x" in told.detail
    assert message in told.detail
    assert "libvirtd" in told.hint


@pytest.mark.parametrize(
    ("message", "code", "domain"),
    [
        ("authentication failed", libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_FROM_NONE),
        ("polkit says no", libvirt.VIR_ERR_AUTH_UNAVAILABLE, libvirt.VIR_FROM_POLKIT),
        (
            "Failed to connect socket to '/run/libvirt/libvirt-sock': Permission denied",
            libvirt.VIR_ERR_SYSTEM_ERROR,
            libvirt.VIR_FROM_RPC,
        ),
    ],
)
def test_refused_connection_points_at_the_group(
    libvirt_error: MakeError, message: str, code: int, domain: int
) -> None:
    told = translate(libvirt_error(message, code, domain), "open x", Code.GUEST_FAILED)
    assert told.code is Code.HYPERVISOR_UNAVAILABLE
    assert "group libvirt" in told.hint


def test_a_missing_log_daemon_is_told_from_a_missing_libvirtd(libvirt_error: MakeError) -> None:
    """What libvirt 11.3 says where virtlogd does not run: the failed call is to that, not to it."""
    message = "Failed to connect socket to '/run/libvirt/virtlogd-sock': No such file or directory"
    error = libvirt_error(message, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC)
    told = translate(error, "start guest x", Code.GUEST_FAILED)
    assert told.transient
    assert "systemctl start virtlogd.socket" in told.hint


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Could not open '/srv/d.qcow2': Permission denied", "every directory above"),
        ("Could not access KVM kernel module: No such file or directory", "/dev/kvm"),
        ("file system may not support O_DIRECT", "ext4"),
        ("operation failed: domain 'x' already exists with uuid 1", "rename"),
        ('Failed to get "write" lock', "orphaned QEMU"),
        ("operation failed: Unable to find any firmware to satisfy 'efi'", "ovmf"),
        ("something never seen before", ""),
    ],
)
def test_what_libvirt_answered_comes_with_a_hint(
    libvirt_error: MakeError, message: str, hint: str
) -> None:
    error = libvirt_error(message, libvirt.VIR_ERR_INTERNAL_ERROR)
    told = translate(error, "start guest x", Code.GUEST_FAILED)
    assert (told.code, told.transient) == (Code.GUEST_FAILED, False)
    assert told.detail == f"cannot start guest x: {message}"
    assert hint in told.hint
    assert bool(told.hint) == bool(hint)


@pytest.mark.parametrize(
    ("code", "int1", "transient"),
    [
        (libvirt.VIR_ERR_OPERATION_TIMEOUT, -1, True),
        (libvirt.VIR_ERR_SYSTEM_ERROR, errno.EBUSY, True),
        (libvirt.VIR_ERR_SYSTEM_ERROR, errno.EACCES, False),
        (libvirt.VIR_ERR_OPERATION_FAILED, errno.EBUSY, False),
    ],
)
def test_busy_domain_passes_by_itself(
    libvirt_error: MakeError, code: int, int1: int, transient: bool
) -> None:
    error = libvirt_error("x", code, int1=int1)
    assert translate(error, "stop guest x", Code.GUEST_FAILED).transient is transient


def test_error_without_a_number_is_still_told() -> None:
    error = libvirt.libvirtError("virStreamRecv() failed")
    error.err = None
    assert code_of(error) == -1
    assert not connection_lost(error)
    assert "virStreamRecv" in translate(error, "read", Code.GUEST_FAILED).detail
