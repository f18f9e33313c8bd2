"""What it costs to know who calls, against one verification by PyJWT, which does the cryptography."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from gpud.api.auth import Authenticator
from gpud.config import Auth
from gpud.dev.issuer import Issuer
from tests.bench.core import Bench
from tests.bench.row import Row, Target

_AUDIENCE = "gpud"
_TIMES = 500


async def measure(bench: Bench) -> AsyncIterator[Row]:
    issuer = Issuer(client_id="gpu-ai", client_secret="x", audience=_AUDIENCE)
    key: RSAPrivateKey = issuer.private_key(issuer.kid)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    file = bench.directory / "key.pem"
    file.write_bytes(pem)
    async with aiohttp.ClientSession() as session:
        tokens = Tokens(issuer, file, session)
        ours, floor = await bench.take_turns(
            "first tokens", bench.rounds(500, 200), tokens.first, tokens.verify_first
        )
        what, against = "first token of a new key", "one PyJWT verification, new key"
        yield Row(what, against, "µs", ours, floor, Target(1.3))
        ours, floor = await bench.take_turns(
            "remembered tokens", bench.rounds(50, 20), tokens.again, tokens.verify_again
        )
        yield Row("a remembered token", "one PyJWT verification", "µs", ours, floor, Target(0.05))


class Tokens:
    """Both sides; all in microseconds for one token."""

    def __init__(self, issuer: Issuer, key_file: Path, session: aiohttp.ClientSession) -> None:
        self._issuer = issuer
        self._auth = Auth(issuer=issuer.url, audience=[_AUDIENCE], key_files=[key_file])
        self._pem = key_file.read_bytes()
        self._session = session
        self._kept: Authenticator | None = None
        self._token = issuer.mint()
        self._key = self._new_key()

    async def first(self) -> float:
        """A token never seen, signed with a key that has been loaded and never used."""
        authenticator = await self._new()
        header = f"Bearer {self._issuer.mint()}"
        began = time.perf_counter()
        await authenticator.authenticate(header)
        return (time.perf_counter() - began) * 1e6

    def verify_first(self) -> float:
        token, key = self._issuer.mint(), self._new_key()
        began = time.perf_counter()
        self._verify(token, key)
        return (time.perf_counter() - began) * 1e6

    async def again(self) -> float:
        """The same token again and again, as a request's gate asks for it."""
        header = f"Bearer {self._token}"
        if self._kept is None:
            self._kept = await self._new()
            await self._kept.authenticate(header)
        remembered = self._kept.remembered
        began = time.perf_counter()
        for _ in range(_TIMES):
            remembered(header)
        took_s = time.perf_counter() - began
        assert remembered(header) is not None
        return took_s / _TIMES * 1e6

    def verify_again(self) -> float:
        began = time.perf_counter()
        for _ in range(_TIMES):
            self._verify(self._token, self._key)
        return (time.perf_counter() - began) / _TIMES * 1e6

    async def _new(self) -> Authenticator:
        authenticator = Authenticator(self._auth, self._session)
        await authenticator.start()
        return authenticator

    def _new_key(self) -> RSAPublicKey:
        key = load_pem_public_key(self._pem)
        assert isinstance(key, RSAPublicKey)
        return key

    def _verify(self, token: str, key: RSAPublicKey) -> None:
        issuer = self._issuer.url
        jwt.decode(token, key, algorithms=["RS256"], audience=_AUDIENCE, issuer=issuer)
