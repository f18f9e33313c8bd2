"""Who may call, where, and how much: the listeners and their limits."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal

from pydantic import Field

from gpud.config.section import Section
from gpud.configtypes import AbsolutePath, HttpsUrl, Port, Seconds

PerMinute = Annotated[int, Field(ge=10, le=1_000_000)] | None
"""Requests. At least 10: a caller who repeats a failed request twice must not be stopped by it."""


class Tls(Section):
    """Certificate chain and key, PEM. Both or neither."""

    certificate_file: AbsolutePath
    key_file: AbsolutePath


class Limits(Section):
    """How many requests of a kind one client may make each minute; None for any number.

    A client is who the token was issued to. Who shows no good token, or needs none, is told by its
    address.
    """

    offerings_per_minute: PerMinute = 120
    orders_per_minute: PerMinute = 120
    statuses_per_minute: PerMinute = 1200
    terminations_per_minute: PerMinute = 120
    document_per_minute: PerMinute = 60
    refused_tokens_per_minute: PerMinute = 60


class Server(Section):
    """The listener that GPU.ai calls, and its limits."""

    listen: str = "0.0.0.0"  # noqa: S104 - GPU.ai calls from outside
    port: Port = 8443
    public_url: HttpsUrl | None = None
    tls: Tls | None = None
    trusted_proxies: list[IPv4Network | IPv6Network] = []
    proxy_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for"
    max_connections_per_address: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    max_body_bytes: Annotated[int, Field(ge=1024, le=16 * 2**20)] = 2**20
    header_timeout_s: Seconds = 15
    body_timeout_s: Seconds = 15
    request_timeout_s: Seconds = 30
    keepalive_timeout_s: Seconds = 75
    shutdown_timeout_s: Seconds = 10
    limits: Limits = Limits()


class Metrics(Section):
    """The Prometheus listener; loopback unless the operator says otherwise."""

    enabled: bool = True
    listen: str = "127.0.0.1"
    port: Port = 9487
