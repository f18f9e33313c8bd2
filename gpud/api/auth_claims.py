"""What a token says of itself, held against the config: times, issuer, audience, client, scope.

The same rules serve a JWT's claims (RFC 7519, section 4.1) and the answer of an introspection
endpoint (RFC 7662, section 2.2), which names its members alike but may leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from gpud.api.auth_error import AuthError, Reason
from gpud.config import Auth

Claims = Mapping[str, Any]

_CLIENT_CLAIMS: Final = ("client_id", "azp", "sub")


class Caller(NamedTuple):
    """Who makes a request, as the token's issuer vouches for.

    Attributes:
        subject: The ``sub`` claim, or None.
        client_id: The OAuth2 client: the first of ``client_id``, ``azp`` and ``sub``, or None.
        expires_at: Seconds since the epoch, before leeway; None when the issuer set no end.
    """

    subject: str | None
    client_id: str | None
    expires_at: float | None


class ClaimRules:
    """The config's demands on a token."""

    def __init__(self, config: Auth, clock: Callable[[], float], *, complete: bool) -> None:
        """Take the rules from ``config``.

        Args:
            config: What is demanded.
            clock: Seconds since the epoch.
            complete: Whether ``exp``, ``iss`` and ``aud`` must be there; else they are checked
                where present.
        """
        self._config = config
        self._clock = clock
        self._complete = complete

    def check(self, claims: Claims) -> Caller:
        """Return who the token speaks for.

        Raises:
            AuthError: A demand is not met.
        """
        expires_at = self._check_times(claims)
        self._check_issuer(claims)
        self._check_audience(claims)
        subject = _text(claims, "sub")
        client_id = next((text for name in _CLIENT_CLAIMS if (text := _text(claims, name))), None)
        if self._config.client_ids and client_id not in self._config.client_ids:
            raise AuthError(Reason.CLIENT)
        self._check_scopes(claims)
        return Caller(subject=subject, client_id=client_id, expires_at=expires_at)

    def _check_times(self, claims: Claims) -> float | None:
        now, leeway_s = self._clock(), self._config.leeway_s
        expires_at = _time(claims, "exp")
        if expires_at is None and self._complete:
            raise AuthError(Reason.NO_EXPIRY)
        if expires_at is not None and now >= expires_at + leeway_s:
            raise AuthError(Reason.EXPIRED)
        for name in ("nbf", "iat"):
            begins_at = _time(claims, name)
            if begins_at is not None and now < begins_at - leeway_s:
                raise AuthError(Reason.NOT_YET_VALID)
        return expires_at

    def _check_issuer(self, claims: Claims) -> None:
        issuer = _text(claims, "iss")
        if issuer is None and not self._complete:
            return
        if issuer != self._config.issuer:
            raise AuthError(Reason.ISSUER)

    def _check_audience(self, claims: Claims) -> None:
        audience = _texts(claims, "aud")
        if audience is None and not self._complete:
            return
        if not set(audience or ()) & set(self._config.audience):
            raise AuthError(Reason.AUDIENCE)

    def _check_scopes(self, claims: Claims) -> None:
        if not self._config.scopes:
            return
        # "scope" is one string of words (RFC 8693, section 4.2); some issuers write a list "scp".
        name = "scope" if "scope" in claims else "scp"
        granted = {word for text in _texts(claims, name) or () for word in text.split()}
        if not granted.issuperset(self._config.scopes):
            raise AuthError(Reason.SCOPE, scopes=self._config.scopes)


def _time(claims: Claims, name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AuthError(Reason.CLAIM)
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise AuthError(Reason.CLAIM)
    return seconds


def _text(claims: Claims, name: str) -> str | None:
    value = claims.get(name)
    if value is not None and not isinstance(value, str):
        raise AuthError(Reason.CLAIM)
    return value


def _texts(claims: Claims, name: str) -> list[str] | None:
    value = claims.get(name)
    if value is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise AuthError(Reason.CLAIM)
    return texts
