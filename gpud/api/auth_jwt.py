"""Judges JWTs: which key signed them, whether it did, and what they claim (RFC 7519, RFC 8725)."""

from __future__ import annotations

from typing import Any, Final, Protocol

import jwt

from gpud.api.auth_claims import ClaimRules
from gpud.api.auth_error import AuthError, Reason
from gpud.api.auth_memory import Verdict
from gpud.api.auth_token import JwtHeader, json_object, jwt_header
from gpud.api.keys import KeySet, VerificationKey

MAX_KEYS_TRIED: Final = 8
"""Bounds the work that a forged token without ``kid`` can cause."""


class KeySource(Protocol):
    """Where verification keys come from."""

    @property
    def keys(self) -> KeySet | None:
        """The keys in use; None while there have never been any."""

    @property
    def retry_after_s(self) -> int | None:
        """Seconds until the next attempt to get keys, while the last one failed; else None."""

    async def start(self) -> None:
        """Get the keys, and begin to keep them fresh."""

    async def close(self) -> None:
        """Stop keeping them fresh."""

    async def refresh(self) -> None:
        """Look for newer keys now, unless that was done a moment ago."""

    async def reload(self) -> None:
        """Get the keys again because the operator says so; on failure the old stay in use."""


class JwtJudge:
    """Tells whether a JWT is good."""

    def __init__(self, source: KeySource, rules: ClaimRules, algorithms: frozenset[str]) -> None:
        self._source = source
        self._rules = rules
        self._algorithms = algorithms
        self._jws = jwt.PyJWS(algorithms=sorted(algorithms))

    @property
    def ready(self) -> bool:
        """Whether there are keys to judge with."""
        return self._source.keys is not None

    async def start(self) -> None:
        """Start the key source."""
        await self._source.start()

    async def close(self) -> None:
        """Close the key source."""
        await self._source.close()

    async def reload(self) -> None:
        """Have the key source get its keys again."""
        await self._source.reload()

    async def judge(self, token: str) -> Verdict:
        """Return for whom the token speaks.

        Raises:
            AuthError: It is not good, or there is no key to judge it with.
        """
        header = jwt_header(token)
        if header.algorithm not in self._algorithms:
            raise AuthError(Reason.ALGORITHM)
        signed = self._verify(token, header)
        if signed is None and await self._found_newer_keys(header.kid):
            signed = self._verify(token, header)
        if signed is None:
            raise self._refusal(header)
        key, claims = signed
        return Verdict(caller=self._rules.check(claims), key=key)

    async def _found_newer_keys(self, kid: str | None) -> bool:
        if self._knows(kid):
            return False
        before = self._source.keys
        await self._source.refresh()
        return self._source.keys != before

    def _knows(self, kid: str | None) -> bool:
        return self._source.keys is not None and self._source.keys.knows(kid)

    def _candidates(self, header: JwtHeader) -> list[VerificationKey]:
        keys = self._source.keys
        return [] if keys is None else keys.candidates(header.kid, header.algorithm)

    def _verify(
        self, token: str, header: JwtHeader
    ) -> tuple[VerificationKey, dict[str, Any]] | None:
        candidates = self._candidates(header)
        if len(candidates) > MAX_KEYS_TRIED:
            return None
        signed = [
            (key, claims)
            for key in candidates
            if (claims := self._claims(token, header.algorithm, key)) is not None
        ]
        return signed[0] if len(signed) == 1 else None

    def _claims(self, token: str, algorithm: str, key: VerificationKey) -> dict[str, Any] | None:
        try:
            payload = self._jws.decode(token, key.public_key, algorithms=[algorithm])
        except (jwt.PyJWTError, ValueError, TypeError):
            return None  # raised further, the error would carry pieces of the token
        return json_object(payload)

    def _refusal(self, header: JwtHeader) -> AuthError:
        known, retry_after_s = self._knows(header.kid), self._source.retry_after_s
        if self._source.keys is None:
            return AuthError(Reason.KEYS_UNAVAILABLE, retry_after_s=retry_after_s or 1)
        if self._candidates(header):
            return AuthError(Reason.SIGNATURE)
        if known:
            return AuthError(Reason.ALGORITHM)
        if header.kid is not None and retry_after_s is not None:
            # The issuer may well have a new key; while it cannot be asked, a 401 would be a guess.
            return AuthError(Reason.KEYS_UNAVAILABLE, retry_after_s=retry_after_s)
        return AuthError(Reason.UNKNOWN_KEY)
