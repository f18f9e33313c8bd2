"""Who may call, where, and how much: the listeners and their limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gpud.config.section import Section
from gpud.configtypes import AbsolutePath, Port, Seconds


class Tls(Section):
    """Certificate chain and key, PEM. Both or neither."""

    certificate_file: AbsolutePath
    key_file: AbsolutePath


class Server(Section):
    """The listener that GPU.ai calls, and its limits."""

    listen: str = "0.0.0.0"  # noqa: S104 - GPU.ai calls from outside
    port: Port = 8443
    tls: Tls | None = None
    max_body_bytes: Annotated[int, Field(ge=1024, le=16 * 2**20)] = 2**20
    body_timeout_s: Seconds = 15
    request_timeout_s: Seconds = 30
    keepalive_timeout_s: Seconds = 75
    shutdown_timeout_s: Seconds = 10


class Metrics(Section):
    """The Prometheus listener; loopback unless the operator says otherwise."""

    enabled: bool = True
    listen: str = "127.0.0.1"
    port: Port = 9487
