"""Verification keys from a JWKS URL: cached, kept fresh, and kept through an outage."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

import aiohttp
from structlog import get_logger
from yarl import URL

from gpud.api.auth_fetch import TRANSPORT_ERRORS, FetchError, joined, read_body, reason_of, shown
from gpud.api.keys import MAX_KEY_DOCUMENT_BYTES, Jwks, KeySet, UnusableKeyError, read_jwks
from gpud.config import Auth

_log = get_logger()

_HEADERS: Final = {"Accept": "application/jwk-set+json, application/json"}
_OK: Final = 200
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 3
_MAX_RETRY_DELAY_S: Final = 60.0


class JwksUrl:
    """Keys that the issuer publishes at a URL."""

    def __init__(
        self,
        config: Auth,
        session: aiohttp.ClientSession,
        *,
        monotonic: Callable[[], float],
        on_change: Callable[[KeySet], None],
    ) -> None:
        """Prepare; nothing is fetched before :meth:`start`.

        Args:
            config: With ``jwks_url`` set.
            session: Makes the requests; stays its owner's to close.
            monotonic: A clock that never jumps, in seconds.
            on_change: Told of the keys whenever they are others than before.
        """
        self._url = URL(config.jwks_url or "")
        self._shown_url = shown(config.jwks_url or "")
        self._refresh_s = config.jwks_refresh_s
        self._min_interval_s = config.jwks_min_interval_s
        self._timeout = aiohttp.ClientTimeout(total=config.http_timeout_s)
        self._session = session
        self._monotonic = monotonic
        self._on_change = on_change
        self._jwks: Jwks | None = None
        self._failures = 0
        self._problem: str | None = None
        self._next_fetch_at = -math.inf
        self._last_demand_at = -math.inf
        self._flight: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def keys(self) -> KeySet | None:
        """The keys last fetched; None while there have never been any."""
        return self._jwks.keys if self._jwks else None

    @property
    def problem(self) -> str | None:
        """Why the last attempt failed; None when it did not."""
        return self._problem

    @property
    def retry_after_s(self) -> int | None:
        """Seconds until the next attempt, at least 1, while the last one failed; else None."""
        if not self._failures:
            return None
        return max(1, math.ceil(self._next_fetch_at - self._monotonic()))

    async def start(self) -> None:
        """Make the first attempt, whatever comes of it; each attempt appoints the next."""
        await self._fetch_once()

    async def close(self) -> None:
        """Stop refreshing. The keys stay in use."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.gather(self._flight, return_exceptions=True)

    async def refresh(self) -> None:
        """Fetch because a token needs it: once per ``jwks_min_interval_s``, for all who wait."""
        if self._flight is None:
            if self._monotonic() - self._last_demand_at < self._min_interval_s:
                return
            self._last_demand_at = self._monotonic()
        await self._fetch_once()

    async def reload(self) -> None:
        """Fetch now; a failure is logged like any other."""
        await self._fetch_once()

    async def _fetch_once(self) -> None:
        """Fetch, or join the fetch under way."""
        await joined(self._begin())

    def _begin(self) -> asyncio.Task[None]:
        if self._flight is None:
            self._flight = asyncio.create_task(self._fetch(), name="jwks-fetch")
        return self._flight

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(self._timeout.total):
                jwks = read_jwks(await self._download(self._url))
        except (*TRANSPORT_ERRORS, FetchError, UnusableKeyError) as error:
            self._failed(reason_of(error))
        else:
            self._fetched(jwks)
        finally:
            self._flight = None
            self._appoint_next()

    def _appoint_next(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._closed:
            return
        delay_s = retry_delay_s(self._failures, self._refresh_s)
        self._next_fetch_at = self._monotonic() + delay_s
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._begin)

    async def _download(self, url: URL) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._session.get(
                url, headers=_HEADERS, timeout=self._timeout, allow_redirects=False
            ) as response:
                if response.status in _REDIRECTS:
                    url = _redirect_target(url, response.headers.get("Location", ""))
                    continue
                if response.status != _OK:
                    raise FetchError(f"the answer has status {response.status}")
                return await read_body(response, MAX_KEY_DOCUMENT_BYTES)
        raise FetchError(f"redirected more than {_MAX_REDIRECTS} times")

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._problem = reason
        if self._failures == 1:
            kept = len(self.keys.keys) if self.keys else 0
            _log.warning(
                "jwks unavailable", url=self._shown_url, reason=reason, keys_still_in_use=kept
            )

    def _fetched(self, jwks: Jwks) -> None:
        if self._failures:
            _log.info("jwks available again", url=self._shown_url, after_failures=self._failures)
        self._failures = 0
        self._problem = None
        before, self._jwks = self._jwks, jwks
        if before == jwks:
            return
        _log.info(
            "jwks changed",
            url=self._shown_url,
            kids=sorted(key.kid or "" for key in jwks.keys.keys),
            passed_over=jwks.passed_over,
        )
        if before is None or before.keys != jwks.keys:
            self._on_change(jwks.keys)


def retry_delay_s(failures: int, refresh_s: float) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4 up to a minute, or ``refresh_s``."""
    if failures == 0:
        return refresh_s
    return min(2.0 ** min(failures - 1, 16), _MAX_RETRY_DELAY_S, refresh_s)


def _redirect_target(url: URL, location: str) -> URL:
    """Follow only to https or within the same origin, so that keys never come over a weaker way."""
    target = url.join(URL(location))
    if not location or (target.scheme != "https" and target.origin() != url.origin()):
        raise FetchError("redirected to somewhere else than https")
    return target
