"""Who calls: turns an ``Authorization`` header into a caller, or says why not.

Three kinds of token checking hide behind one :class:`Authenticator`: JWTs with keys from a JWKS URL
or from files, and opaque tokens by introspection. A token found good is remembered, so that a
caller who polls with it costs neither a signature check nor a question to the issuer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import aiohttp

from gpud.api.auth_claims import Caller, ClaimRules
from gpud.api.auth_error import AuthError, Reason
from gpud.api.auth_jwks import JwksUrl
from gpud.api.auth_jwt import JwtJudge, KeySource
from gpud.api.auth_key_files import KeyFiles
from gpud.api.auth_memory import TokenMemory, Verdict
from gpud.api.auth_token import MAX_HEADER_CHARS, bearer_token
from gpud.api.introspection import Introspector
from gpud.api.keys import KeySet
from gpud.config import Auth

__all__ = ["AuthError", "Authenticator", "Caller", "Reason"]

_PREFIX: Final = "bearer "
_PREFIX_CHARS: Final = len(_PREFIX)


class TokenJudge(Protocol):
    """Tells whether a token is good."""

    @property
    def ready(self) -> bool:
        """Whether it could judge a token now."""

    async def start(self) -> None:
        """Get what judging needs."""

    async def close(self) -> None:
        """Let go of it."""

    async def reload(self) -> None:
        """Get it again because the operator says so; on failure the old stays in use."""

    async def judge(self, token: str) -> Verdict:
        """Return for whom ``token`` speaks, or raise :class:`AuthError`."""


class Authenticator:
    """Judges the bearer tokens of requests, by the ``auth`` section of the config."""

    def __init__(
        self,
        config: Auth,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Prepare; nothing is read or fetched before :meth:`start`.

        Args:
            config: How a token is judged.
            session: Asks the issuer; stays its owner's to close.
            clock: Seconds since the epoch.
            monotonic: A clock that never jumps, in seconds.
            environ: Where systemd tells the directory of credentials.
        """
        self._memory = TokenMemory(config.remembered_tokens, config.leeway_s, clock, monotonic)
        rules = ClaimRules(config, clock, complete=config.introspection is None)
        self._judge: TokenJudge
        if config.introspection is not None:
            self._judge = Introspector(
                config.introspection,
                session,
                rules,
                timeout_s=config.http_timeout_s,
                environ=environ,
                monotonic=monotonic,
            )
            return
        source: KeySource
        if config.jwks_url is not None:
            source = JwksUrl(config, session, monotonic=monotonic, on_change=self._keys_changed)
        else:
            source = KeyFiles(config.key_files, self._keys_changed)
        self._judge = JwtJudge(source, rules, frozenset(config.algorithms))

    @property
    def ready(self) -> bool:
        """Whether a token could be judged now; False until a JWKS was first fetched."""
        return self._judge.ready

    async def start(self) -> None:
        """Get the keys or the client secret; for a JWKS URL, begin to refresh in the background.

        An unreachable JWKS is no failure: requests get 503 until it can be had.

        Raises:
            GpudError: ``CONFIG_INVALID``: a key file or the client secret is not usable.
        """
        await self._judge.start()

    async def close(self) -> None:
        """Stop the background work."""
        await self._judge.close()

    async def reload(self) -> None:
        """Read the key files or the client secret again, or fetch the JWKS now.

        Raises:
            GpudError: ``CONFIG_INVALID``: a file is not usable; what was loaded stays in use.
        """
        await self._judge.reload()

    def remembered(self, authorization: str | None) -> Caller | None:
        """Return the caller at once, if this very header's token is remembered as good."""
        if authorization is None or len(authorization) > MAX_HEADER_CHARS:
            return None
        if authorization[:_PREFIX_CHARS].lower() != _PREFIX:
            return None
        return self._memory.recall(authorization[_PREFIX_CHARS:])

    async def authenticate(self, authorization: str | None) -> Caller:
        """Return who makes the request with this ``Authorization`` header.

        Raises:
            AuthError: No token, not a good one, or it cannot be judged now; see ``reason``.
        """
        token = bearer_token(authorization)
        caller = self._memory.recall(token)
        if caller is None:
            verdict = await self._judge.judge(token)
            self._memory.keep(token, verdict)
            caller = verdict.caller
        return caller

    def _keys_changed(self, keys: KeySet) -> None:
        self._memory.forget_keys_except(keys.keys)
