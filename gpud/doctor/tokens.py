"""Check of the keys that tokens are judged with."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Final

import aiohttp

from gpud.api.auth_fetch import TRANSPORT_ERRORS, reason_of, shown
from gpud.api.auth_jwks import JwksUrl
from gpud.api.auth_key_files import load_key_files
from gpud.api.keys import KeySet
from gpud.config import Auth, Introspection
from gpud.doctor.check import Check, Group, Verdict
from gpud.errors import GpudError
from gpud.secrets import read_secret

_KEYS: Final = Check(Group.TOKENS, "keys")
_SECRET: Final = Check(Group.TOKENS, "client secret")
_ENDPOINT: Final = Check(Group.TOKENS, "introspection")
_MOST_S: Final = 5.0


async def tokens(auth: Auth) -> list[Verdict]:
    """Whether a token could be judged now."""
    limit_s = min(auth.http_timeout_s, _MOST_S)
    try:
        if auth.introspection is not None:
            return await _introspection(auth.introspection, limit_s)
        if auth.jwks_url is not None:
            return [await _jwks(auth, auth.jwks_url, limit_s)]
        keys = await asyncio.to_thread(load_key_files, auth.key_files)
    except GpudError as error:
        return [_KEYS.failed(error)]
    return [usable(keys, auth.algorithms, "auth.key_files")]


def usable(keys: KeySet, algorithms: Sequence[str], source: str) -> Verdict:
    """Whether a key may verify what the configuration lets tokens be signed with."""
    fitting = [key for key in keys.keys if key.algorithms & set(algorithms)]
    if fitting:
        return _KEYS.ok(f"{len(fitting)} for {', '.join(algorithms)} from {source}")
    others = sorted({name for key in keys.keys for name in key.algorithms})
    return _KEYS.fault(
        f"none from {source} is for {', '.join(algorithms)}",
        f"auth.algorithms: of {', '.join(others)}, the one that the issuer signs with",
    )


async def _jwks(auth: Auth, url: str, limit_s: float) -> Verdict:
    quick = auth.model_copy(update={"http_timeout_s": limit_s})
    async with aiohttp.ClientSession() as session:
        source = JwksUrl(quick, session, monotonic=time.monotonic, on_change=lambda _: None)
        await source.start()
        await source.close()
    if source.keys is None:
        return _KEYS.fault(
            f"{shown(url)}: {source.problem}", f"auth.jwks_url; curl -sS {shown(url)} from here"
        )
    return usable(source.keys, auth.algorithms, shown(url))


async def _introspection(config: Introspection, limit_s: float) -> list[Verdict]:
    found = []
    try:
        await asyncio.to_thread(read_secret, config.client_secret, os.environ)
        found.append(_SECRET.ok("can be read"))
    except GpudError as error:
        found.append(_SECRET.failed(error))
    timeout = aiohttp.ClientTimeout(total=limit_s)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(config.url, allow_redirects=False),
        ):
            # Any answer is one: what it is to a question without credentials says nothing.
            found.append(_ENDPOINT.ok(f"{shown(config.url)} answers"))
    except TRANSPORT_ERRORS as error:
        found.append(
            _ENDPOINT.fault(
                f"{shown(config.url)}: {reason_of(error)}",
                "auth.introspection.url; is it reachable?",
            )
        )
    return found
