"""Tells systemd how the service is doing, over the datagram socket it names (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send ``state``, such as ``READY=1``; does nothing where systemd did not ask for it.

    Returns:
        Whether it was sent. A socket that has gone away is no reason for the daemon to stop.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            # A leading @ stands for the NUL byte of Linux' abstract namespace.
            sender.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sender.sendall(state.encode())
        except OSError:
            return False
    return True
