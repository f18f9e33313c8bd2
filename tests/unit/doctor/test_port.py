"""The port that GPU.ai calls, and the packet filter before it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpud import command
from gpud.command import Completed
from gpud.config import Server, Tls
from gpud.doctor.check import Level
from gpud.doctor.port import firewall, is_loopback, judge_chains, port
from gpud.errors import Code, GpudError
from tests.unit.doctor.parts import free_port

TLS = Tls(certificate_file=Path("/c"), key_file=Path("/k"))
EVERYWHERE = Server(listen="0.0.0.0", port=8443)


@pytest.fixture
def taken() -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Server(listen="127.0.0.1", port=listener.getsockname()[1])


def test_a_free_port_is_well() -> None:
    server = Server(listen="127.0.0.1", port=free_port())
    assert port(server, daemon_up=False).level is Level.OK
    assert port(Server(listen="::1", port=server.port), daemon_up=False).level is Level.OK


def test_a_port_open_to_all_wants_tls() -> None:
    number = free_port()
    server = Server(listen="0.0.0.0", port=number)
    assert port(server, daemon_up=False).level is Level.WARNING
    secured = Server(listen="0.0.0.0", port=number, tls=TLS)
    assert port(secured, daemon_up=False).level is Level.OK


def test_a_port_that_the_daemon_has_is_well(taken: Server) -> None:
    assert port(taken, daemon_up=True).level is Level.OK


def test_a_port_that_somebody_else_has_is_a_fault(taken: Server) -> None:
    found = port(taken, daemon_up=False)
    assert found.level is Level.FAULT
    assert found.mend.startswith(f"ss -ltnp 'sport = :{taken.port}'")


def test_an_address_that_this_server_does_not_have_is_a_fault() -> None:
    found = port(Server(listen="192.0.2.1", port=8443), daemon_up=False)
    assert found.level is Level.FAULT
    assert "Cannot assign requested address" in found.what


def test_a_name_that_stands_for_nothing_is_a_fault() -> None:
    assert port(Server(listen="no.such.host.invalid"), daemon_up=False).level is Level.FAULT


def test_a_low_port_is_roots_alone_whoever_asks() -> None:
    found = port(Server(listen="127.0.0.1", port=997), daemon_up=False)
    assert found.level is Level.WARNING
    assert "CAP_NET_BIND_SERVICE" in found.mend


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [("127.0.0.2", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(listen: str, *, loopback: bool) -> None:
    assert is_loopback(listen) is loopback


def chain(**fields: str) -> dict[str, dict[str, str]]:
    return {"chain": {"family": "inet", "table": "filter", "name": "input", **fields}}


def chains(*found: dict[str, dict[str, str]]) -> str:
    return json.dumps({"nftables": [{"metainfo": {}}, *found]})


def test_a_filter_that_drops_by_default_is_told_with_the_rule_to_add() -> None:
    dropping = chains(chain(hook="input", policy="drop"), chain(hook="forward", policy="drop"))
    found = judge_chains(dropping, 8443, "unknown")
    assert found.what == "inet filter input drops what no rule lets in"
    assert found.mend.startswith("nft add rule inet filter input tcp dport 8443 accept")


def test_a_filter_that_drops_nothing_says_what_it_cannot_tell() -> None:
    found = judge_chains(chains(chain(), chain(hook="input", policy="accept")), 8443, "unknown")
    assert (found.level, found.mend) == (Level.NOTE, "")
    assert found.what.endswith("unknown")


async def test_on_loopback_no_filter_matters(taken: Server) -> None:
    assert (await firewall(taken, is_root=True)).level is Level.OK


async def test_only_root_sees_the_filter() -> None:
    assert (await firewall(EVERYWHERE, is_root=False)).mend == "sudo gpud doctor"


async def test_the_filter_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listed(*argv: str, timeout_s: float) -> Completed:
        assert argv == ("nft", "-j", "list", "chains")
        assert timeout_s
        return Completed(chains(chain(hook="input", policy="drop")), "", 0)

    monkeypatch.setattr(command, "run", listed)
    assert "drops" in (await firewall(EVERYWHERE, is_root=True)).what


async def test_a_filter_that_cannot_be_asked_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing(*_: object, **__: object) -> Completed:
        raise GpudError(Code.HOST_COMMAND_FAILED, "the program nft is not installed")

    monkeypatch.setattr(command, "run", missing)
    found = await firewall(EVERYWHERE, is_root=True)
    assert found.level is Level.NOTE
    assert "not installed" in found.what
