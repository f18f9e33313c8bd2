"""sd_notify on real datagram sockets."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from gpud.systemd import notify, reloading, watchdog_s


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


def test_a_systemd_that_does_not_read_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpud.systemd._SEND_S", 0.01)
    path = str(tmp_path / "notify")
    with listener(path):
        sent = 0
        while notify("WATCHDOG=1", {"NOTIFY_SOCKET": path}):
            sent += 1
    assert sent > 0


def test_a_reload_is_told_with_its_moment() -> None:
    state, _, moment = reloading().partition("\nMONOTONIC_USEC=")
    assert state == "RELOADING=1"
    assert abs(int(moment) / 1e6 - time.clock_gettime(time.CLOCK_MONOTONIC)) < 5


@pytest.mark.parametrize(
    ("environ", "period_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_systemd_says_how_often_it_wants_to_hear(
    environ: dict[str, str], period_s: float | None
) -> None:
    assert watchdog_s(environ) == period_s
