"""Judges tokens by asking their issuer (OAuth 2.0 Token Introspection, RFC 7662)."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote_plus

import aiohttp
from structlog import get_logger

from gpud.api.auth_claims import ClaimRules
from gpud.api.auth_error import AuthError, Reason
from gpud.api.auth_fetch import TRANSPORT_ERRORS, FetchError, joined, read_body, reason_of, shown
from gpud.api.auth_memory import Verdict
from gpud.api.auth_token import json_object
from gpud.config import Introspection
from gpud.secrets import read_secret

_log = get_logger()

_OK: Final = 200
_MAX_ANSWER_BYTES: Final = 65536
_RETRY_AFTER_S: Final = 5
_FAILING_S: Final = 120.0
"""For how long a question that failed tells of the next: while there are callers, one comes sooner."""


class Introspector:
    """Asks the issuer about each token that is not remembered."""

    def __init__(
        self,
        config: Introspection,
        session: aiohttp.ClientSession,
        rules: ClaimRules,
        *,
        timeout_s: float,
        environ: Mapping[str, str],
        monotonic: Callable[[], float],
    ) -> None:
        """Prepare; the client secret is read by :meth:`start`.

        Args:
            config: The endpoint and gpud's own credentials there.
            session: Makes the requests; stays its owner's to close.
            rules: What an active token must satisfy besides.
            timeout_s: How long the endpoint may take.
            environ: Where systemd tells the directory of credentials.
            monotonic: A clock that never jumps, in seconds.
        """
        self._config = config
        self._session = session
        self._rules = rules
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._environ = environ
        self._monotonic = monotonic
        self._authorization: str | None = None
        self._failed_at: float | None = None
        self._flights: dict[bytes, asyncio.Task[dict[str, Any] | None]] = {}

    @property
    def ready(self) -> bool:
        """Whether the client secret is at hand, and the last question, if it was lately, was answered."""
        lately = self._failed_at is not None and self._monotonic() - self._failed_at < _FAILING_S
        return self._authorization is not None and not lately

    async def start(self) -> None:
        """Read the client secret.

        Raises:
            GpudError: ``CONFIG_INVALID``.
        """
        await self.reload()

    async def reload(self) -> None:
        """Read the client secret again; on failure the old one stays in use.

        Raises:
            GpudError: ``CONFIG_INVALID``.
        """
        secret = await asyncio.to_thread(read_secret, self._config.client_secret, self._environ)
        self._authorization = _basic(self._config.client_id, secret)

    async def close(self) -> None:
        """End the questions under way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def judge(self, token: str) -> Verdict:
        """Return for whom the token speaks.

        Raises:
            AuthError: It is not good, or the endpoint gives no usable answer.
        """
        answer = await self._answer(token)
        if answer is None:
            raise AuthError(Reason.INTROSPECTION_UNAVAILABLE, retry_after_s=_RETRY_AFTER_S)
        if answer["active"] is False:
            raise AuthError(Reason.INACTIVE)
        return Verdict(self._rules.check(answer), remember_s=self._config.remember_s)

    async def _answer(self, token: str) -> dict[str, Any] | None:
        """Ask, or join whoever is asking about the same token."""
        name = hashlib.sha256(token.encode()).digest()
        flight = self._flights.get(name)
        if flight is None:
            flight = asyncio.create_task(self._ask(token), name="introspection")
            self._flights[name] = flight
            flight.add_done_callback(lambda _: self._flights.pop(name))
        return await joined(flight)

    async def _ask(self, token: str) -> dict[str, Any] | None:
        try:
            answer = await self._post(token)
        except (*TRANSPORT_ERRORS, FetchError) as error:
            self._failed(reason_of(error))
            return None
        if self._failed_at is not None:
            _log.info("introspection available again", url=shown(self._config.url))
        self._failed_at = None
        return answer

    async def _post(self, token: str) -> dict[str, Any]:
        if self._authorization is None:
            raise FetchError("the client secret has not been read")
        async with self._session.post(
            self._config.url,
            data={"token": token, "token_type_hint": "access_token"},
            headers={"Authorization": self._authorization, "Accept": "application/json"},
            timeout=self._timeout,
            allow_redirects=False,
        ) as response:
            if response.status != _OK:
                raise FetchError(f"the answer has status {response.status}")
            answer = json_object(await read_body(response, _MAX_ANSWER_BYTES))
        if answer is None or not isinstance(answer.get("active"), bool):
            raise FetchError("the answer is not that of an introspection endpoint")
        return answer

    def _failed(self, reason: str) -> None:
        if self._failed_at is None:
            _log.warning("introspection unavailable", url=shown(self._config.url), reason=reason)
        self._failed_at = self._monotonic()


def _basic(client_id: str, secret: str) -> str:
    # Both are form-encoded before they are joined (RFC 6749, section 2.3.1).
    joined = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return "Basic " + b64encode(joined.encode("ascii")).decode("ascii")
