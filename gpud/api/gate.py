"""What every request goes through on its way to a route."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import structlog
from aiohttp import web
from structlog.contextvars import bound_contextvars

from gpud.api.auth import Authenticator, AuthError, Caller, Reason
from gpud.api.origin import origin_of
from gpud.api.problem import from_http, problem
from gpud.api.rate import Rates
from gpud.api.routes import BODY, REQUEST_ID
from gpud.config import Server
from gpud.errors import Code, GpudError
from gpud.telemetry import Metrics

_log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_COUNTED = web.RequestKey("counted", tuple)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = frozenset({"/openapi.yaml"})
_UNROUTED = "(none)"
_READS = frozenset({"GET", "HEAD"})
_METHODS = _READS | {"POST", "DELETE"}
_RETRY_AFTER_S = 5
_SERVER_ERROR: Final = int(HTTPStatus.INTERNAL_SERVER_ERROR)

_LIMIT_OF: Final = {
    "/openapi.yaml": dict.fromkeys(_READS, "document_per_minute"),
    "/v1/gpu/available": dict.fromkeys(_READS, "offerings_per_minute"),
    "/v1/instances": {"POST": "orders_per_minute"},
    "/v1/instances/{id}": {
        **dict.fromkeys(_READS, "statuses_per_minute"),
        "DELETE": "terminations_per_minute",
    },
}
"""Which of ``server.limits`` bounds a route's method."""

_REFUSED: Final = "refused_tokens_per_minute"
_LINES: Final = "lines"
_LINES_PER_MINUTE: Final = 60
_NOT_THE_TOKENS_FAULT: Final = frozenset({Code.MISSING_TOKEN, Code.AUTH_UNAVAILABLE})


class Gate:
    """Names every request, checks its token, bounds it, and turns errors into problems.

    Args:
        server: The limits.
        authenticator: Judges tokens.
        metrics: Where requests are counted.
        rates: Counts requests.
    """

    def __init__(
        self,
        server: Server,
        authenticator: Authenticator,
        metrics: Metrics,
        rates: Rates | None = None,
    ) -> None:
        self.reconfigure(server, authenticator)
        self._metrics = metrics
        self._rates = rates or Rates()
        for reason in Reason:  # so that the first of each is seen as an increase
            metrics.token_failures.labels(reason.value)

    @property
    def ready(self) -> bool:
        """Whether a token could be judged now."""
        return self._authenticator.ready

    def reconfigure(self, server: Server, authenticator: Authenticator) -> None:
        """Go by these from the next request on."""
        self._server = server
        self._authenticator = authenticator
        self._limits: dict[tuple[str, str], tuple[str, int | None]] = {
            (route, method): (limit, getattr(server.limits, limit))
            for route, limits in _LIMIT_OF.items()
            for method, limit in limits.items()
        }

    @web.middleware
    async def pass_through(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The one middleware."""
        began = time.perf_counter()
        asked_id = request.headers.get("X-Request-Id")
        request_id = asked_id if asked_id and _REQUEST_ID.fullmatch(asked_id) else new_request_id()
        request[REQUEST_ID] = request_id
        route = _route(request)
        try:
            response = await self._answer(request, route, handler)
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
        self._account(request, route, response.status, time.perf_counter() - began)
        return response

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Bound what a request waits for.

        Raises:
            GpudError: ``TOO_SLOW``. Not a 4xx, which would be final: what was asked may still become
                durable, and a repeat of the request finds out.
        """
        try:
            async with asyncio.timeout(self._server.request_timeout_s):
                yield
        except TimeoutError:
            raise GpudError(
                Code.TOO_SLOW, "the request took too long", retry_after_s=_RETRY_AFTER_S
            ) from None

    async def _answer(
        self, request: web.Request, route: str, handler: Handler
    ) -> web.StreamResponse:
        if request.match_info.http_exception is not None:
            return await handler(request)  # which raises it
        if route in _OPEN_PATHS:
            self._count(request, route, origin_of(request, self._server).site)
        else:
            authorization = _authorization(request)
            caller = self._authenticator.remembered(authorization)
            if caller is None:
                caller = await self._meet(request, authorization)
            self._count(request, route, caller.client_id or caller.subject or "")
        if request.method in _READS:
            return await handler(request)  # from memory, as a rule; what it waits for, it bounds
        async with self.in_time():
            request[BODY] = await self._body(request)
            with bound_contextvars(**self._client(request)):
                return await handler(request)

    async def _meet(self, request: web.Request, authorization: str | None) -> Caller:
        """Who makes the request, by a token that is not remembered.

        It costs a signature check or a question to the issuer, so who sends bad ones may do so only so
        often.

        Raises:
            AuthError: The token is not good.
            GpudError: ``RATE_LIMITED``: too many were not.
        """
        authenticator = self._authenticator
        per_minute: int | None = self._server.limits.refused_tokens_per_minute
        if authorization is None or per_minute is None:
            return await authenticator.authenticate(authorization)
        key = (_REFUSED, origin_of(request, self._server).site)
        self._take(key, per_minute)  # first, so that many at once are counted
        try:
            caller = await authenticator.authenticate(authorization)
        except AuthError as error:
            if error.code in _NOT_THE_TOKENS_FAULT:
                self._rates.give_back(key, per_minute)
            raise
        self._rates.give_back(key, per_minute)
        return caller

    def _count(self, request: web.Request, route: str, client: str) -> None:
        """Count a request.

        Raises:
            GpudError: ``RATE_LIMITED``: it is one too many.
        """
        limit, per_minute = self._limits[route, request.method]
        if per_minute is None:
            return
        key = (limit, client)
        self._take(key, per_minute)
        request[_COUNTED] = (key, per_minute)

    def _take(self, key: tuple[str, str], per_minute: int) -> None:
        if wait_s := self._rates.take(key, per_minute):
            what = "refused tokens" if key[0] == _REFUSED else "requests of this kind"
            raise GpudError(
                Code.RATE_LIMITED, f"too many {what} from this client", retry_after_s=wait_s
            )

    async def _body(self, request: web.Request) -> bytes:
        most = self._server.max_body_bytes
        if (request.content_length or 0) > most:
            raise GpudError(Code.PAYLOAD_TOO_LARGE, "the body is too large")
        try:
            async with asyncio.timeout(self._server.body_timeout_s):
                return await request.clone(client_max_size=most).read()
        except TimeoutError:
            raise GpudError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
        except web.RequestPayloadError:
            raise GpudError(Code.INVALID_REQUEST, "the body is not encoded as declared") from None

    def _refuse(self, request: web.Request, error: GpudError) -> web.StreamResponse:
        if isinstance(error, AuthError):
            self._metrics.token_failures.labels(error.reason.value).inc()
        if self._worth_a_line(request, error):
            _log.info(
                "request refused", request_id=request[REQUEST_ID], method=request.method,
                route=_route(request), code=error.code.value,
                problems=[p.where for p in error.problems], **self._client(request),
            )  # fmt: skip
        if error.http_status == _SERVER_ERROR:
            _log.error("request failed", request_id=request[REQUEST_ID], error=str(error))
        response = problem(error, request[REQUEST_ID])
        if error.code in {Code.PAYLOAD_TOO_LARGE, Code.REQUEST_TIMEOUT}:
            # What is left of the body is not worth reading.
            response.force_close()
        return response

    def _worth_a_line(self, request: web.Request, error: GpudError) -> bool:
        """Whether a refusal is logged: of callers nobody knows, only so many, or they fill the log."""
        if not isinstance(error, AuthError) and request.match_info.http_exception is None:
            return True
        key = (_LINES, origin_of(request, self._server).site)
        return self._rates.take(key, _LINES_PER_MINUTE) == 0

    def _account(self, request: web.Request, route: str, status: int, seconds: float) -> None:
        if status >= _SERVER_ERROR and _COUNTED in request:
            self._rates.give_back(*request[_COUNTED])  # GPU.ai repeats it, and is right to
        method = request.method if request.method in _METHODS else "other"
        self._metrics.requests.count(route, method, status, seconds)

    def _client(self, request: web.Request) -> dict[str, str]:
        origin = origin_of(request, self._server)
        return {"client_address": str(origin.address), "client_scheme": origin.scheme}


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


def new_request_id() -> str:
    """A name for a request that brings none: another one than those in the log around it."""
    return f"{random.getrandbits(64):016x}"
