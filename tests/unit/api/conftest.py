"""A real token issuer on loopback, clocks that stand still, authenticators, and the whole API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from gpud.api.auth import Authenticator
from gpud.api.gate import Gate
from gpud.api.routes import Routes
from gpud.api.web import build_app
from gpud.config import Auth
from gpud.dev.issuer import JWKS_PATH, Issuer
from gpud.guest.image import ImageStore
from tests.unit.client import Client, OpenClient
from tests.unit.service import NOW, Clock, Service, config_from, images, running_service

__all__ = ["images"]  # a fixture that the tests beside this folder use too

Eventually = Callable[[Callable[[], object]], Awaitable[None]]


class IssuerHost:
    """The issuer behind its socket, which can be made to fail and counts what it is asked.

    ``answer``, when set, is what every request gets instead; ``gate`` holds requests until set.
    """

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.asked: list[str] = []
        self.answer: Callable[[], web.Response] | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def jwks_fetches(self) -> int:
        return self.asked.count(JWKS_PATH)

    def fail(self, status: int = 500) -> None:
        self.answer = lambda: web.Response(status=status)

    def recover(self) -> None:
        self.answer = None

    def application(self) -> web.Application:
        application = self.issuer.application()
        application.middlewares.append(self._intercept)
        return application

    @web.middleware
    async def _intercept(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(request.path)
        await self.gate.wait()
        if self.answer is not None:
            return self.answer()
        response: web.StreamResponse = await handler(request)
        return response


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def monotonic() -> Clock:
    return Clock(1000.0)


@pytest.fixture
async def host(clock: Clock, key_maker: Any) -> AsyncIterator[IssuerHost]:
    issuer = Issuer(
        client_id="supplier-7",
        client_secret="s3:cr+t %",
        audience="https://supplier.example/v1",
        clock=clock,
        key_maker=key_maker,
    )
    host = IssuerHost(issuer)
    server = TestServer(host.application())
    await server.start_server()
    issuer.url = str(server.make_url("/")).rstrip("/")
    yield host
    host.gate.set()
    await server.close()


@pytest.fixture
def issuer(host: IssuerHost) -> Issuer:
    return host.issuer


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def build(
    issuer: Issuer, session: aiohttp.ClientSession, clock: Clock, monotonic: Clock
) -> AsyncIterator[Callable[..., Authenticator]]:
    """Make an authenticator; keyword arguments go over the defaults of the ``auth`` section."""
    built: list[Authenticator] = []

    def make(*, environ: dict[str, str] | None = None, **overrides: Any) -> Authenticator:
        settings = {
            "issuer": issuer.url,
            "audience": ["https://supplier.example/v1"],
            "jwks_url": issuer.jwks_url,
            **overrides,
        }
        authenticator = Authenticator(
            Auth.model_validate(settings),
            session,
            clock=clock,
            monotonic=monotonic,
            environ=environ or {},
        )
        built.append(authenticator)
        return authenticator

    yield make
    for authenticator in built:
        await authenticator.close()


@pytest.fixture
async def authenticator(build: Callable[..., Authenticator]) -> Authenticator:
    """One that has the issuer's keys."""
    authenticator = build()
    await authenticator.start()
    return authenticator


@pytest.fixture
def eventually() -> Eventually:
    """Wait, in tiny naps, for what another task is about to bring about."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def said(logs: list[Any], caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """All that was logged, by gpud and by the libraries under it."""
    caplog.set_level(logging.DEBUG)
    return lambda: f"{logs!r} {caplog.text} {[record.exc_text for record in caplog.records]}"


@pytest.fixture
def settings() -> dict[str, Any]:
    """Sections of the config that a test wants otherwise; parametrize or override it."""
    return {}


@pytest.fixture
async def service(
    tmp_path: Path, images: ImageStore, clock: Clock, settings: dict[str, Any]
) -> AsyncIterator[Service]:
    config = config_from(tmp_path, **settings)
    async with running_service(config, images, clock) as service:
        yield service


@pytest.fixture
async def open_client(
    service: Service,
    build: Callable[..., Authenticator],
    issuer: Issuer,
    session: aiohttp.ClientSession,
    clock: Clock,
) -> AsyncIterator[OpenClient]:
    """Put the whole API behind a real listener; keyword arguments go into the ``auth`` section."""
    async with AsyncExitStack() as stack:

        async def start(**auth: Any) -> Client:
            authenticator = build(**auth)
            await authenticator.start()
            config = service.config
            gate = Gate(config.server, authenticator, service.metrics)
            routes = Routes(
                service.desk, service.store, config.network, service.metrics, gate.in_time, clock
            )
            app = build_app(gate, routes)
            server = TestServer(app)
            await server.start_server(access_log=None)
            stack.push_async_callback(server.close)
            return Client(session, server.make_url("/"), issuer.mint(scope="gpu"))

        yield start


@pytest.fixture
async def client(open_client: OpenClient) -> Client:
    return await open_client()
