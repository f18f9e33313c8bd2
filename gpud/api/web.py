"""The HTTP application that GPU.ai calls: what every request goes through on its way to a route."""

from __future__ import annotations

import asyncio
import re
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib.resources import files

import structlog
from aiohttp import web
from cryptography import x509

from gpud.api.auth import Authenticator, AuthError, Reason
from gpud.api.problem import from_http, problem
from gpud.api.routes import BODY, REQUEST_ID, Routes
from gpud.config import Server, Tls
from gpud.errors import Code, GpudError
from gpud.telemetry import Metrics

_log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = frozenset({"/openapi.yaml"})
_UNROUTED = "(none)"
_RETRY_AFTER_S = 5


def openapi_document() -> bytes:
    """The OpenAPI document of the API, as it is served."""
    return files("gpud.api").joinpath("openapi.yaml").read_bytes()


def build_app(
    server: Server, routes: Routes, authenticator: Authenticator, metrics: Metrics
) -> web.Application:
    """Put the application together."""
    gate = _Gate(server, authenticator, metrics)
    app = web.Application(middlewares=[gate.pass_through], client_max_size=server.max_body_bytes)
    document = openapi_document()

    async def openapi(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/yaml")

    app.add_routes(
        [
            web.get("/openapi.yaml", openapi),
            web.get("/v1/gpu/available", routes.available),
            web.post("/v1/instances", routes.create),
            web.get("/v1/instances/{id}", routes.show),
            web.delete("/v1/instances/{id}", routes.delete),
        ]
    )
    return app


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Server-side TLS from the configured files.

    Raises:
        GpudError: ``CONFIG_INVALID``: the files cannot be read or do not fit together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password OpenSSL would ask for an encrypted key's on the terminal, and wait.
        context.load_cert_chain(tls.certificate_file, tls.key_file, password="")
    except (OSError, ssl.SSLError) as error:
        raise GpudError(
            Code.CONFIG_INVALID,
            f"server.tls: {tls.certificate_file} and {tls.key_file} cannot be used: {error}",
        ) from error
    return context


def certificate_expires_at(tls: Tls) -> float:
    """When the certificate that callers see expires, in seconds since the epoch.

    Raises:
        GpudError: ``CONFIG_INVALID``: it cannot be read.
    """
    try:
        # The first of the file is the server's own (RFC 8446, section 4.4.2).
        own = x509.load_pem_x509_certificates(tls.certificate_file.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise GpudError(
            Code.CONFIG_INVALID, f"server.tls: {tls.certificate_file} cannot be read: {error}"
        ) from error
    return own.not_valid_after_utc.timestamp()


class _Gate:
    """Names every request, checks its token, bounds its time, and turns errors into problems."""

    def __init__(self, server: Server, authenticator: Authenticator, metrics: Metrics) -> None:
        self._server = server
        self._authenticator = authenticator
        self._metrics = metrics
        for reason in Reason:  # so that the first of each is seen as an increase
            metrics.token_failures.labels(reason.value)

    @web.middleware
    async def pass_through(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The one middleware."""
        began = time.perf_counter()
        asked_id = request.headers.get("X-Request-Id", "")
        request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else secrets.token_hex(8)
        request[REQUEST_ID] = request_id
        try:
            response = await self._answer(request, handler)
        except GpudError as error:
            response = self._refuse(request, error)
        except web.HTTPException as error:
            response = self._refuse(request, from_http(error))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception as error:  # noqa: BLE001 - a caller gets a problem, never a traceback
            _log.error("request failed unexpectedly", request_id=request_id, exc_info=error)
            response = problem(GpudError(Code.INTERNAL, "internal"), request_id)
        response.headers["X-Request-Id"] = request_id
        self._account(request, response.status, time.perf_counter() - began)
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        known = request.match_info.http_exception is None
        if known and request.path not in _OPEN_PATHS:
            authorization = _authorization(request)
            caller = self._authenticator.remembered(authorization)
            if caller is None:
                await self._authenticator.authenticate(authorization)
        try:
            async with asyncio.timeout(self._server.request_timeout_s):
                if known and request.method not in {"GET", "HEAD"}:
                    request[BODY] = await self._body(request)
                return await handler(request)
        except TimeoutError:
            # Not a 4xx, which would be final: what was asked may still become durable, and a repeat
            # of the request finds out.
            raise GpudError(
                Code.TOO_SLOW, "the request took too long", retry_after_s=_RETRY_AFTER_S
            ) from None

    async def _body(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self._server.max_body_bytes:
            raise GpudError(Code.PAYLOAD_TOO_LARGE, "the body is too large")
        try:
            async with asyncio.timeout(self._server.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise GpudError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
        except web.RequestPayloadError:
            raise GpudError(Code.INVALID_REQUEST, "the body is not encoded as declared") from None

    def _refuse(self, request: web.Request, error: GpudError) -> web.StreamResponse:
        if isinstance(error, AuthError):
            self._metrics.token_failures.labels(error.reason.value).inc()
        _log.info(
            "request refused", request_id=request[REQUEST_ID], method=request.method,
            route=_route(request), code=error.code.value, problems=[p.where for p in error.problems],
        )  # fmt: skip
        if error.http_status == HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("request failed", request_id=request[REQUEST_ID], error=str(error))
        response = problem(error, request[REQUEST_ID])
        if error.code in {Code.PAYLOAD_TOO_LARGE, Code.REQUEST_TIMEOUT}:
            # What is left of the body is not worth reading.
            response.force_close()
        return response

    def _account(self, request: web.Request, status: int, seconds: float) -> None:
        route = _route(request)
        self._metrics.requests.labels(route, _method(request), str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)


def _authorization(request: web.Request) -> str | None:
    given = request.headers.getall("Authorization", ())
    if len(given) > 1:
        # Which of them a proxy in front has judged cannot be known.
        raise AuthError(Reason.MALFORMED)
    return given[0] if given else None


def _route(request: web.Request) -> str:
    """The route's pattern: a metric label and log field that no caller can make up."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else _UNROUTED


def _method(request: web.Request) -> str:
    return request.method if request.method in {"GET", "HEAD", "POST", "DELETE"} else "other"
