"""Where a request comes from: the peer's address, or what a trusted proxy says of its own peer.

Each proxy adds the address of its own peer at the end of a header that the client may have begun (RFC
7239, section 5.2, and the older ``X-Forwarded-For``). So it is read from its end, as far as trusted
proxies reach; what stands before that is anybody's word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp import web

from gpud.config import Server

Address = IPv4Address | IPv6Address
_IPV6_SITE_BITS = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Who sent a request, as far as the network tells.

    Attributes:
        address: Of the client; None where there is none, as on a Unix socket.
        scheme: ``http`` or ``https``, as the client used it.
    """

    address: Address | None
    scheme: str

    @property
    def site(self) -> str:
        """What counts as one: an IPv4 address, or the /64 that an IPv6 host chooses its own from."""
        if isinstance(self.address, IPv6Address):
            return str(IPv6Network((int(self.address), _IPV6_SITE_BITS), strict=False))
        return str(self.address)


def origin_of(request: web.Request, server: Server) -> Origin:
    """Where ``request`` comes from."""
    transport = request.transport
    peername = transport.get_extra_info("peername") if transport is not None else None
    peer = parse_address(peername[0]) if isinstance(peername, tuple) else None
    if peer is None or not trusted(peer, server):
        return Origin(peer, request.scheme)
    if server.proxy_header == "forwarded":
        hops = [(hop.get("for", ""), hop.get("proto", "")) for hop in request.forwarded]
    else:
        texts = _listed(request, "X-Forwarded-For")
        scheme = next(iter(_listed(request, "X-Forwarded-Proto")[-1:]), "")
        hops = [(text, scheme) for text in texts]
    return _walk(Origin(peer, request.scheme), hops, server)


def trusted(address: Address, server: Server) -> bool:
    """Whether what comes from there is from one of the operator's proxies."""
    return any(address in network for network in server.trusted_proxies)


def parse_address(text: str) -> Address | None:
    """An address, maybe with a port, or in brackets; None when it is nothing of the kind."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # An IPv4 client of a dual-stack listener is an IPv4 client (RFC 4291, section 2.5.5.2).
    return getattr(address, "ipv4_mapped", None) or address


def _walk(nearest: Origin, hops: Sequence[tuple[str, str]], server: Server) -> Origin:
    """Go from the nearest proxy towards the client, no further than trusted proxies vouch for."""
    found = nearest
    for text, scheme in reversed(hops):
        address = parse_address(text)
        if address is None:  # hidden or nonsense: all that is known is who said so
            break
        known = scheme.lower() if scheme.lower() in {"http", "https"} else found.scheme
        found = Origin(address, known)
        if not trusted(address, server):
            break
    return found


def _listed(request: web.Request, name: str) -> list[str]:
    return [part.strip() for line in request.headers.getall(name, ()) for part in line.split(",")]
