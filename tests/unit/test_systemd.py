"""sd_notify on real datagram sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gpud.systemd import notify


def listener(address: str) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(address)
    receiver.settimeout(1)
    return receiver


def test_state_reaches_the_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with listener(path) as receiver:
        assert notify("READY=1\nSTATUS=up", {"NOTIFY_SOCKET": path})
        assert receiver.recv(100) == b"READY=1\nSTATUS=up"


def test_state_reaches_an_abstract_socket() -> None:
    name = f"gpud-test-{os.getpid()}"
    with listener("\0" + name) as receiver:
        assert notify("STOPPING=1", {"NOTIFY_SOCKET": "@" + name})
        assert receiver.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}])
def test_nothing_is_sent_where_nobody_asked(environ: dict[str, str]) -> None:
    assert not notify("READY=1", environ)


def test_a_socket_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
