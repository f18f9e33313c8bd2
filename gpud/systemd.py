"""Tells systemd how the service is doing, over the datagram socket it names (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

_SEND_S = 1.0
"""A systemd that does not read must not hold up the daemon."""


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send ``state``, such as ``READY=1``; does nothing where systemd did not ask for it.

    Returns:
        Whether it was sent. A socket that has gone away is no reason for the daemon to stop.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_SEND_S)
        try:
            # A leading @ stands for the NUL byte of Linux' abstract namespace.
            sender.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sender.sendall(state.encode())
        except OSError:
            return False
    return True


def reloading() -> str:
    """What to tell when a reload begins; ``READY=1`` ends it, whatever came of it.

    systemd wants the moment too, on the clock that it reads itself.
    """
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Within how many seconds systemd wants each next ``WATCHDOG=1`` (sd_watchdog_enabled(3)).

    Returns:
        None where it watches nobody, or another process.
    """
    microseconds = environ.get("WATCHDOG_USEC", "")
    meant_for = environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdecimal() or int(microseconds) == 0 or meant_for != str(os.getpid()):
        return None
    return int(microseconds) / 1e6
