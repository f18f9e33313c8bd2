"""How bearer tokens are judged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from gpud.config.section import Section
from gpud.configtypes import AbsolutePath, HttpsUrl, Seconds


class SecretSource(Section):
    """Where a secret is read from: a file, or a systemd credential. Never written in the YAML."""

    file: AbsolutePath | None = None
    credential: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = None

    @field_validator("credential")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("file") is None):
            raise ValueError("give exactly one of file and credential")
        return value

    # Without this, a section that names neither is never held against the rule above.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class Introspection(Section):
    """RFC 7662 token introspection, for tokens that are not JWTs."""

    url: HttpsUrl
    client_id: Annotated[str, Field(min_length=1)]
    client_secret: SecretSource
    remember_s: Seconds = 60


Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]


class Auth(Section):
    """How a bearer token is judged. One key source: ``jwks_url``, ``key_files`` or ``introspection``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = ["RS256"]
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 30
    client_ids: list[str] = []
    scopes: list[str] = []
    key_files: list[AbsolutePath] = []
    introspection: Introspection | None = None
    jwks_url: HttpsUrl | None = None
    jwks_refresh_s: Seconds = 600
    jwks_min_interval_s: Seconds = 30
    http_timeout_s: Seconds = 10
    remembered_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 4096

    @field_validator("jwks_url")
    @classmethod
    def _one_key_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if not {"key_files", "introspection"} <= info.data.keys():
            return value  # one of them was given, and is told to be wrong
        sources = [value, info.data["key_files"], info.data["introspection"]]
        if sum(bool(source) for source in sources) != 1:
            raise ValueError("give exactly one of jwks_url, key_files and introspection")
        return value
