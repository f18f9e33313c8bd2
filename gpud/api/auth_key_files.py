"""Verification keys from files: PEM public keys, X.509 certificates, or JWK Sets."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from structlog import get_logger

from gpud.api.keys import (
    MAX_KEY_DOCUMENT_BYTES,
    KeySet,
    UnusableKeyError,
    VerificationKey,
    holds_secret_key,
    read_jwks,
    verification_key,
)
from gpud.errors import Code, GpudError, Problem

_log = get_logger()

_PEM_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_PRIVATE_HINT: Final = "the signing key stays with its issuer; put its public key here"


def load_key_files(paths: Sequence[Path]) -> KeySet:
    """Read every file; each may hold several PEM blocks, or one JWK Set.

    A certificate is only the envelope of its key: neither its dates nor its issuer are looked at.

    Raises:
        GpudError: ``CONFIG_INVALID``, with every file that is not usable and why.
    """
    keys: set[VerificationKey] = set()
    problems: list[Problem] = []
    for path in paths:
        try:
            keys |= _read(path)
        except UnusableKeyError as error:
            problems.append(Problem(str(path), str(error)))
        except OSError as error:
            problems.append(Problem(str(path), error.strerror or "cannot be read"))
    if problems:
        raise GpudError(
            Code.CONFIG_INVALID,
            "token keys could not be loaded (auth.key_files)",
            problems=problems,
        )
    return KeySet(frozenset(keys))


class KeyFiles:
    """Keys that change only when the operator says so."""

    def __init__(self, paths: Sequence[Path], on_change: Callable[[KeySet], None]) -> None:
        self._paths = tuple(paths)
        self._on_change = on_change
        self._keys: KeySet | None = None

    @property
    def keys(self) -> KeySet | None:
        """The keys in use; None before the start."""
        return self._keys

    @property
    def retry_after_s(self) -> int | None:
        """Always None: files are not tried again by themselves."""
        return None

    async def start(self) -> None:
        """Load the files.

        Raises:
            GpudError: ``CONFIG_INVALID``; a daemon whose keys are unusable must not start.
        """
        await self.reload()

    async def close(self) -> None:
        """Nothing to stop."""

    async def refresh(self) -> None:
        """Nothing to do: a token cannot make the files newer."""

    async def reload(self) -> None:
        """Load the files again; every file must be good, else the old keys stay in use.

        Raises:
            GpudError: ``CONFIG_INVALID``, with every file that is not usable and why.
        """
        keys = await asyncio.to_thread(load_key_files, self._paths)
        if keys != self._keys:
            self._keys = keys
            self._on_change(keys)
            _log.info("token keys loaded", files=len(self._paths), keys=len(keys.keys))


def _read(path: Path) -> set[VerificationKey]:
    with path.open("rb") as file:
        content = file.read(MAX_KEY_DOCUMENT_BYTES + 1)
    if len(content) > MAX_KEY_DOCUMENT_BYTES:
        raise UnusableKeyError(f"is larger than {MAX_KEY_DOCUMENT_BYTES} bytes")
    if content.lstrip().startswith(b"{"):
        if holds_secret_key(content):
            raise UnusableKeyError(f"holds a private or shared key; {_PRIVATE_HINT}")
        return set(read_jwks(content).keys.keys)
    return _read_pem(content)


def _read_pem(content: bytes) -> set[VerificationKey]:
    blocks = [(found[1].decode(), found[0]) for found in _PEM_BLOCK.finditer(content)]
    if any("PRIVATE KEY" in label for label, _ in blocks):
        raise UnusableKeyError(f"holds a private key; {_PRIVATE_HINT}")
    if not blocks:
        raise UnusableKeyError("holds neither a PEM block nor a JWK Set")
    if sum(label == "CERTIFICATE" for label, _ in blocks) > 1:
        # The keys of a chain's authorities must not become keys that sign tokens.
        raise UnusableKeyError("holds several certificates; put only the signer's own here")
    return {_from_pem(label, block) for label, block in blocks}


def _from_pem(label: str, block: bytes) -> VerificationKey:
    try:
        if label == "CERTIFICATE":
            return verification_key(x509.load_pem_x509_certificate(block).public_key())
        if label in {"PUBLIC KEY", "RSA PUBLIC KEY"}:
            return verification_key(load_pem_public_key(block))
    except (ValueError, UnsupportedAlgorithm):
        raise UnusableKeyError(f"holds a damaged {label}") from None
    raise UnusableKeyError(f"holds a {label}; a PUBLIC KEY or a CERTIFICATE belongs here")
