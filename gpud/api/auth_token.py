"""Takes the token out of an ``Authorization`` header, and a JWT's header out of the token."""

from __future__ import annotations

import binascii
import re
from base64 import urlsafe_b64decode
from typing import Any, Final, NamedTuple

from pydantic_core import from_json

from gpud.api.auth_error import AuthError, Reason

MAX_HEADER_CHARS: Final = 16 * 1024

_SCHEME: Final = "bearer"
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""``b64token`` of RFC 6750, section 2.1."""
_JWT_SEGMENTS: Final = 3


class JwtHeader(NamedTuple):
    """What of a JWT's header gpud heeds. Keys that a token brings along are not among it."""

    algorithm: str
    kid: str | None


def bearer_token(authorization: str | None) -> str:
    """Return the token of an ``Authorization: Bearer`` header.

    Raises:
        AuthError: There is no header, it is of another scheme, too large, or not well formed.
    """
    if authorization is None:
        raise AuthError(Reason.MISSING)
    if len(authorization) > MAX_HEADER_CHARS:
        raise AuthError(Reason.TOO_LARGE)
    scheme, _, rest = authorization.strip(" \t").partition(" ")
    if scheme.lower() != _SCHEME:
        raise AuthError(Reason.MISSING)
    token = rest.lstrip(" ")
    if _TOKEN.fullmatch(token) is None:
        raise AuthError(Reason.MALFORMED)
    return token


def jwt_header(token: str) -> JwtHeader:
    """Read the header of a signed JWT. Nothing of it is to be trusted yet.

    ``jku``, ``x5u``, ``jwk`` and ``x5c`` are not looked at: whoever forges a token chooses them.

    Raises:
        AuthError: ``token`` is not a JWT, or demands an extension (``crit``); none is known here.
    """
    header = _header_object(token)
    if header is None:
        raise AuthError(Reason.MALFORMED)
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or not isinstance(kid, str | None):
        raise AuthError(Reason.MALFORMED)
    if "crit" in header:
        raise AuthError(Reason.CRITICAL)
    return JwtHeader(algorithm=algorithm, kid=kid)


def json_object(text: bytes) -> dict[str, Any] | None:
    """Return the JSON object that ``text`` is, or None when it is none."""
    try:
        value = from_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _header_object(token: str) -> dict[str, Any] | None:
    segments = token.split(".")
    if len(segments) != _JWT_SEGMENTS:
        return None
    encoded = segments[0]
    try:
        text = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except binascii.Error:
        return None
    return json_object(text)
