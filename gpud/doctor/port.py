"""Checks of the port that GPU.ai calls."""

from __future__ import annotations

import errno
import json
import os
import socket
from ipaddress import ip_address
from typing import Final

from gpud import command
from gpud.config import Server
from gpud.doctor.check import Check, Group, Verdict
from gpud.errors import GpudError

_PORT: Final = Check(Group.NETWORK, "API port")
_FIREWALL: Final = Check(Group.NETWORK, "firewall")
_NFT_S: Final = 5.0
_FIRST_FREE: Final = 1024
"""The first port that is not for root alone (``net.ipv4.ip_unprivileged_port_start``)."""


def port(server: Server, *, daemon_up: bool) -> Verdict:
    """Whether the daemon can listen where it is to; nothing is left listening.

    Args:
        server: Where.
        daemon_up: A daemon answers, so the port is taken by it.
    """
    where = f"{server.listen} port {server.port}"
    refused = _refusal(server)
    if refused == errno.EADDRINUSE and daemon_up:
        return _PORT.ok(f"{where}, the daemon listens")
    if refused == errno.EADDRINUSE:
        mend = f"ss -ltnp 'sport = :{server.port}' names it; or server.port"
        return _PORT.fault(f"{where} is taken by another program", mend)
    low = server.port < _FIRST_FREE
    if refused == errno.EACCES or (refused is None and low):
        return _PORT.warning(
            f"{where} is for root alone, which the daemon is not",
            f"server.port: {_FIRST_FREE} or above; or AmbientCapabilities=CAP_NET_BIND_SERVICE in"
            " gpud's unit",
        )
    if refused is not None:
        return _PORT.fault(
            f"{where} cannot be listened on: {os.strerror(refused)}",
            "server.listen: an address of this server (ip address shows them), or 0.0.0.0",
        )
    return _secrecy(server, where)


def _secrecy(server: Server, where: str) -> Verdict:
    if server.tls is None and not is_loopback(server.listen):
        return _PORT.warning(
            f"{where} without TLS: tokens and startup scripts can be read on the way",
            "server.tls; or, behind a reverse proxy on this server, server.listen: 127.0.0.1",
        )
    return _PORT.ok(f"{where} is free")


def is_loopback(listen: str) -> bool:
    """Whether nobody but this server itself reaches what listens there."""
    try:
        return ip_address(listen).is_loopback
    except ValueError:  # a name
        return listen == "localhost"


def _refusal(server: Server) -> int | None:
    """Why the address cannot be had; None where it can."""
    family = socket.AF_INET6 if ":" in server.listen else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.listen, server.port))
        except OSError as error:
            return error.errno or errno.EADDRNOTAVAIL
    return None


async def firewall(server: Server, *, is_root: bool) -> Verdict:
    """What of this server's own packet filter is worth a look; one outside of it cannot be seen."""
    if is_loopback(server.listen):
        return _FIREWALL.ok("no matter: the API listens on loopback alone")
    outside = f"whether TCP {server.port} gets through from outside cannot be told from here"
    if not is_root:
        return _FIREWALL.note(f"only root sees its rules; {outside}", "sudo gpud doctor")
    try:
        listed = await command.run("nft", "-j", "list", "chains", timeout_s=_NFT_S)
    except GpudError as error:
        return _FIREWALL.note(f"nothing is known of it: {error.detail}; {outside}")
    return judge_chains(listed.stdout, server.port, outside)


def judge_chains(chains: str, port_number: int, outside: str) -> Verdict:
    """Look for chains that drop what comes in unless a rule says otherwise.

    Args:
        chains: What ``nft -j list chains`` says (libnftables-json(5)).
        port_number: The API's.
        outside: What cannot be told.
    """
    found = [one["chain"] for one in json.loads(chains)["nftables"] if "chain" in one]
    dropping = [
        f"{one['family']} {one['table']} {one['name']}"
        for one in found
        if one.get("hook") == "input" and one.get("policy") == "drop"
    ]
    if dropping:
        return _FIREWALL.note(
            f"{', '.join(dropping)} drops what no rule lets in",
            f"nft add rule {dropping[0]} tcp dport {port_number} accept, unless it is let in already",
        )
    return _FIREWALL.note(f"drops nothing by default; {outside}")
