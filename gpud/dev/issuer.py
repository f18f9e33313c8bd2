"""A small OAuth2 token issuer, for development only.

It stands in for GPU.ai's token endpoint: client credentials in, an RS256 JWT out, with a JWK Set
and an introspection endpoint beside it. It keeps its keys in memory, knows one client, speaks plain
HTTP, and must not be reachable by anybody but the developer.
"""

from __future__ import annotations

import asyncio
import binascii
import hmac
import time
import uuid
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, cast
from urllib.parse import unquote_plus

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from structlog import get_logger

_log = get_logger()

TOKEN_PATH: Final = "/oauth2/token"  # noqa: S105 - a path
INTROSPECTION_PATH: Final = "/oauth2/introspect"
JWKS_PATH: Final = "/.well-known/jwks.json"

TOKEN_LIFETIME_S: Final = 3600
_NO_STORE: Final = {"Cache-Control": "no-store"}


def new_key() -> rsa.RSAPrivateKey:
    """Generate a signing key."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Issuer:
    """Signs tokens for one client, and answers for them.

    Attributes:
        url: Base URL and ``iss`` of its tokens; set by :func:`running_issuer`.
        kid: Name of the key that signs now.
    """

    def __init__(
        self,
        *,
        client_id: str,
        client_secret: str,
        audience: str,
        url: str = "http://127.0.0.1",
        clock: Callable[[], float] = time.time,
        key_maker: Callable[[], rsa.RSAPrivateKey] = new_key,
    ) -> None:
        self.url = url
        self.kid = ""
        self._client_id = client_id
        self._client_secret = client_secret
        self._audience = audience
        self._clock = clock
        self._key_maker = key_maker
        self._keys: dict[str, rsa.RSAPrivateKey] = {}
        self._revoked: set[str] = set()
        self.rotate()

    @property
    def jwks_url(self) -> str:
        """Where its keys are published."""
        return self.url + JWKS_PATH

    @property
    def introspection_url(self) -> str:
        """Where it tells whether a token is active."""
        return self.url + INTROSPECTION_PATH

    def rotate(self) -> str:
        """Sign with a new key from now on; the old ones stay published. Returns the new ``kid``."""
        self.kid = uuid.uuid4().hex[:12]
        self._keys[self.kid] = self._key_maker()
        return self.kid

    def drop_key(self, kid: str) -> None:
        """Stop publishing a key. Raises KeyError for one that is not published."""
        del self._keys[kid]

    def private_key(self, kid: str) -> rsa.RSAPrivateKey:
        """Return a signing key, to forge tokens in tests. Raises KeyError."""
        return self._keys[kid]

    def revoke(self, token: str) -> None:
        """Have introspection call ``token`` inactive from now on."""
        self._revoked.add(token)

    def jwks(self) -> dict[str, list[dict[str, Any]]]:
        """Return the published JWK Set."""
        return {
            "keys": [
                {
                    **RSAAlgorithm.to_jwk(key.public_key(), as_dict=True),
                    "kid": kid,
                    "alg": "RS256",
                    "use": "sig",
                }
                for kid, key in self._keys.items()
            ]
        }

    def mint(self, *, headers: Mapping[str, Any] | None = None, **claims: object) -> str:
        """Sign a token with the current key.

        Args:
            headers: Members of the JOSE header to set; None as value leaves one out.
            **claims: Claims to set in place of the usual ones; None leaves one out.
        """
        now = int(self._clock())
        payload = {
            "iss": self.url,
            "aud": self._audience,
            "sub": self._client_id,
            "client_id": self._client_id,
            "iat": now,
            "exp": now + TOKEN_LIFETIME_S,
            "jti": uuid.uuid4().hex,
            **claims,
        }
        jose = {"kid": self.kid, **(headers or {})}
        return jwt.encode(
            _present(payload), self._keys[self.kid], algorithm="RS256", headers=_present(jose)
        )

    def application(self) -> web.Application:
        """Return the three endpoints as an aiohttp application."""
        application = web.Application()
        application.router.add_post(TOKEN_PATH, self._token)
        application.router.add_post(INTROSPECTION_PATH, self._introspect)
        application.router.add_get(JWKS_PATH, self._publish)
        return application

    async def _publish(self, _: web.Request) -> web.Response:
        return web.json_response(self.jwks())

    async def _token(self, request: web.Request) -> web.Response:
        form = await request.post()
        if not self._is_client(request, form):
            return _invalid_client()
        if form.get("grant_type") != "client_credentials":
            return web.json_response({"error": "unsupported_grant_type"}, status=400)
        answer = {
            "access_token": self.mint(),
            "token_type": "Bearer",
            "expires_in": TOKEN_LIFETIME_S,
        }
        return web.json_response(answer, headers=_NO_STORE)

    async def _introspect(self, request: web.Request) -> web.Response:
        form = await request.post()
        if not self._is_client(request, form):
            return _invalid_client()
        token = form.get("token")
        if not isinstance(token, str):
            return web.json_response({"error": "invalid_request"}, status=400)
        claims = self._active_claims(token)
        answer = {"active": False} if claims is None else {"active": True, **claims}
        return web.json_response(answer, headers=_NO_STORE)

    def _active_claims(self, token: str) -> dict[str, Any] | None:
        if token in self._revoked:
            return None
        try:
            key = self._keys[jwt.get_unverified_header(token)["kid"]]
            claims: dict[str, Any] = jwt.decode(
                token,
                key.public_key(),
                algorithms=["RS256"],
                options={
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_aud": False,
                },
            )
        except (jwt.InvalidTokenError, KeyError):
            return None
        return claims if self._clock() < claims.get("exp", 0) else None

    def _is_client(self, request: web.Request, form: Mapping[str, Any]) -> bool:
        authorization = request.headers.get("Authorization")
        if authorization is not None:
            client_id, secret = _basic_credentials(authorization)
        else:
            client_id = str(form.get("client_id", ""))
            secret = str(form.get("client_secret", ""))
        same_client = hmac.compare_digest(client_id.encode(), self._client_id.encode())
        same_secret = hmac.compare_digest(secret.encode(), self._client_secret.encode())
        return same_client and same_secret


@asynccontextmanager
async def running_issuer(
    *,
    client_id: str,
    client_secret: str,
    audience: str,
    host: str = "127.0.0.1",
    port: int = 0,
    key_maker: Callable[[], rsa.RSAPrivateKey] = new_key,
) -> AsyncIterator[Issuer]:
    """Run an issuer for as long as the block lasts; port 0 takes a free one."""
    issuer = Issuer(
        client_id=client_id, client_secret=client_secret, audience=audience, key_maker=key_maker
    )
    runner = web.AppRunner(issuer.application())
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound_port = cast(tuple[str, int], runner.addresses[0])[1]
        issuer.url = f"http://{host}:{bound_port}"
        yield issuer
    finally:
        await runner.cleanup()


async def serve(host: str, port: int, client_id: str, client_secret: str, audience: str) -> None:
    """Run an issuer until cancelled."""
    async with running_issuer(
        host=host, port=port, client_id=client_id, client_secret=client_secret, audience=audience
    ) as issuer:
        _log.warning("development token issuer runs; never use it in production", url=issuer.url)
        await asyncio.Event().wait()


def _present(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _invalid_client() -> web.Response:
    return web.json_response(
        {"error": "invalid_client"}, status=401, headers={"WWW-Authenticate": "Basic"}
    )


def _basic_credentials(authorization: str) -> tuple[str, str]:
    """Client id and secret, form-encoded inside HTTP Basic (RFC 6749, section 2.3.1)."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        decoded = b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    if scheme.lower() != "basic":
        return "", ""
    client_id, _, secret = decoded.partition(":")
    return unquote_plus(client_id), unquote_plus(secret)
