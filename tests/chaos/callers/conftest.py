"""The whole API behind the daemon's own listener."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
from yarl import URL

from gpud import listeners
from gpud.api.auth import Authenticator
from gpud.api.gate import Gate
from gpud.api.routes import Routes
from gpud.api.web import build_app
from gpud.dev.issuer import Issuer
from tests.machine.processes import free_port
from tests.unit.api.conftest import (
    authenticator,
    build,
    clock,
    host,
    images,
    issuer,
    monotonic,
    open_client,
    service,
    session,
    settings,
)
from tests.unit.client import Client
from tests.unit.conftest import key_maker, signing_keys
from tests.unit.service import Clock, Service

__all__ = [
    "authenticator",
    "build",
    "clock",
    "host",
    "images",
    "issuer",
    "key_maker",
    "monotonic",
    "open_client",
    "service",
    "session",
    "settings",
    "signing_keys",
]


@pytest.fixture
async def client(
    service: Service,
    authenticator: Authenticator,
    issuer: Issuer,
    session: aiohttp.ClientSession,
    clock: Clock,
) -> AsyncIterator[Client]:
    port = free_port()
    server = service.config.server.model_copy(update={"listen": "127.0.0.1", "port": port})
    gate = Gate(server, authenticator, service.metrics)
    routes = Routes(
        service.desk, service.store, service.config.network, service.metrics, gate.in_time, clock
    )
    async with AsyncExitStack() as stack:
        app = build_app(gate, routes)
        await listeners.api(stack, server, None, app)
        yield Client(session, URL(f"http://127.0.0.1:{port}/"), issuer.mint(scope="gpu"))
