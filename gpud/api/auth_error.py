"""Every way a bearer token can fail, and what the caller is told of it (RFC 6750, section 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from gpud.errors import Code, GpudError


class Reason(StrEnum):
    """Why a request was not let in; few and fixed, so that it can label a metric."""

    MISSING = "missing"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    ALGORITHM = "algorithm"
    CRITICAL = "critical"
    UNKNOWN_KEY = "unknown_key"
    SIGNATURE = "signature"
    CLAIM = "claim"
    NO_EXPIRY = "no_expiry"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    ISSUER = "issuer"
    AUDIENCE = "audience"
    CLIENT = "client"
    SCOPE = "scope"
    INACTIVE = "inactive"
    KEYS_UNAVAILABLE = "keys_unavailable"
    INTROSPECTION_UNAVAILABLE = "introspection_unavailable"


_DETAIL: Final[dict[Reason, str]] = {
    Reason.MISSING: "This endpoint needs an Authorization header with a Bearer token",
    Reason.MALFORMED: "The bearer token is not well formed",
    Reason.TOO_LARGE: "The Authorization header is too large",
    Reason.ALGORITHM: "The token is signed with an algorithm that is not accepted here",
    Reason.CRITICAL: "The token demands an extension that is not understood here",
    Reason.UNKNOWN_KEY: "The token is signed with a key that is not known here",
    Reason.SIGNATURE: "The token's signature does not verify",
    Reason.CLAIM: "A claim of the token has a value of the wrong type",
    Reason.NO_EXPIRY: "The token has no expiry time",
    Reason.EXPIRED: "The token has expired",
    Reason.NOT_YET_VALID: "The token is not valid yet",
    Reason.ISSUER: "The token comes from another issuer",
    Reason.AUDIENCE: "The token is meant for another audience",
    Reason.CLIENT: "The token belongs to a client that is not accepted here",
    Reason.SCOPE: "The token does not carry the scope needed here",
    Reason.INACTIVE: "The token is not active",
    Reason.KEYS_UNAVAILABLE: "The keys that tokens are checked with cannot be had right now",
    Reason.INTROSPECTION_UNAVAILABLE: "The service that judges tokens cannot be reached right now",
}
"""What a caller reads. Fixed sentences: nothing of a token can get into them."""

_CODE: Final[dict[Reason, Code]] = {
    Reason.MISSING: Code.MISSING_TOKEN,
    Reason.SCOPE: Code.INSUFFICIENT_SCOPE,
    Reason.KEYS_UNAVAILABLE: Code.AUTH_UNAVAILABLE,
    Reason.INTROSPECTION_UNAVAILABLE: Code.AUTH_UNAVAILABLE,
}


class AuthError(GpudError):
    """A request whose token was refused, or could not be judged.

    Attributes:
        reason: Why, as a metric label.
        scopes: The scopes that were needed, when ``reason`` is ``SCOPE``.
    """

    def __init__(
        self, reason: Reason, *, scopes: Sequence[str] = (), retry_after_s: int | None = None
    ) -> None:
        code = _CODE.get(reason, Code.INVALID_TOKEN)
        super().__init__(code, _DETAIL[reason], retry_after_s=retry_after_s)
        self.reason = reason
        self.scopes = tuple(scopes)

    @property
    def www_authenticate(self) -> str | None:
        """Value of the ``WWW-Authenticate`` header; None when the token is not at fault (503).

        A request without a token gets no error attribute (RFC 6750, section 3.1).
        """
        if self.code is Code.AUTH_UNAVAILABLE:
            return None
        if self.code is Code.MISSING_TOKEN:
            return "Bearer"
        parts = [f'error="{self.code.value}"', f'error_description="{self.detail}"']
        if self.scopes:
            parts.append(f'scope="{_scope_value(self.scopes)}"')
        return "Bearer " + ", ".join(parts)


def _scope_value(scopes: Sequence[str]) -> str:
    # The characters RFC 6749 (section 3.3) allows in a scope; another would break the header.
    return " ".join(re.sub(r"[^!#-\[\]-~]", "", scope) for scope in scopes)
