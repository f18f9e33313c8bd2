"""Public keys that verify tokens, and how they are read from a JWK Set (RFC 7517)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

MAX_KEY_DOCUMENT_BYTES: Final = 2**20
MIN_RSA_BITS: Final = 2048
"""RFC 7518, section 3.3: a key of 2048 bits or more must be used."""
MAX_RSA_BITS: Final = 16384
"""Beyond this, one signature check would hold up the event loop."""

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey

_RSA_ALGORITHMS: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVE_ALGORITHM: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_JWK_PARSERS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}
_SECRET_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_PARSE_ERRORS: Final = (
    jwt.PyJWTError,
    UnsupportedAlgorithm,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
)


class UnusableKeyError(Exception):
    """A key, or a whole document of them, that no token can be verified with; the text says why."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key and what it may be used for. Two are equal when both are the same.

    Attributes:
        kid: The name that tokens know it by; None for a key without one.
        algorithms: JWS algorithms (RFC 7518, section 3.1) that it may verify.
        fingerprint: SHA-256 (hex) of its SubjectPublicKeyInfo.
    """

    kid: str | None
    algorithms: frozenset[str]
    fingerprint: str
    public_key: PublicKey = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class KeySet:
    """The keys in use at one time."""

    keys: frozenset[VerificationKey]

    def knows(self, kid: str | None) -> bool:
        """Whether a key is named ``kid``; never for None."""
        return kid is not None and any(key.kid == kid for key in self.keys)

    def candidates(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """Keys that a token of this header may have been signed with, each key once.

        A token that names a key is held to it; only when no key has that name, those without a
        name (PEM files have none) may have signed it. A token that names none may be anyone's.
        """
        named = self.keys if kid is None else [key for key in self.keys if key.kid == kid]
        named = named or [key for key in self.keys if key.kid is None]
        fitting = {key.fingerprint: key for key in named if algorithm in key.algorithms}
        return list(fitting.values())


@dataclass(frozen=True, slots=True)
class Jwks:
    """A JWK Set as read: its usable keys, and for each other one why it was passed over."""

    keys: KeySet
    passed_over: tuple[str, ...]


def verification_key(
    public_key: object, *, kid: str | None = None, algorithm: str | None = None
) -> VerificationKey:
    """Wrap a public key, with the algorithms that fit its type.

    Args:
        public_key: Of any type that ``cryptography`` loads.
        kid: Its name.
        algorithm: The only algorithm it is meant for, when its source says so.

    Raises:
        UnusableKeyError: No JWS algorithm fits it, or it is too weak.
    """
    if not isinstance(public_key, PublicKey):
        raise UnusableKeyError("is of a type that no token is signed with")
    algorithms = _fitting_algorithms(public_key)
    if algorithm is not None:
        algorithms &= {algorithm}
    if not algorithms:
        raise UnusableKeyError("is of a type that does not fit the algorithm it is meant for")
    der = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return VerificationKey(kid, algorithms, hashlib.sha256(der).hexdigest(), public_key)


def read_jwks(document: bytes) -> Jwks:
    """Read a JWK Set; a key that cannot be used does not spoil the others.

    Raises:
        UnusableKeyError: It is no JWK Set, or has no usable key.
    """
    keys: set[VerificationKey] = set()
    passed_over: list[str] = []
    for position, jwk in enumerate(_members(document)):
        try:
            keys.add(_from_jwk(jwk))
        except UnusableKeyError as error:
            passed_over.append(f"key {position} {error}")
    if not keys:
        raise UnusableKeyError("; ".join(["the JWK Set has no usable key", *passed_over]))
    return Jwks(KeySet(frozenset(keys)), tuple(passed_over))


def holds_secret_key(document: bytes) -> bool:
    """Whether a JWK Set gives away a private or shared key.

    Raises:
        UnusableKeyError: It is no JWK Set.
    """
    return any(isinstance(jwk, dict) and _SECRET_MEMBERS & jwk.keys() for jwk in _members(document))


def _members(document: bytes) -> list[object]:
    try:
        data = json.loads(document)
    except (ValueError, RecursionError):
        raise UnusableKeyError("is not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("keys"), list):
        raise UnusableKeyError('is not a JWK Set: no list "keys"')
    members: list[object] = data["keys"]
    return members


def _from_jwk(jwk: object) -> VerificationKey:
    if not isinstance(jwk, dict):
        raise UnusableKeyError("is not an object")
    parse = _JWK_PARSERS.get(str(jwk.get("kty")))
    _check_purpose(jwk)
    if parse is None:
        raise UnusableKeyError("is of a type (kty) that is not supported")
    try:
        public_key = parse(jwk)
    except _PARSE_ERRORS:
        raise UnusableKeyError("is damaged") from None
    return verification_key(public_key, kid=jwk.get("kid"), algorithm=jwk.get("alg"))


def _check_purpose(jwk: dict[str, Any]) -> None:
    if _SECRET_MEMBERS & jwk.keys():
        raise UnusableKeyError("is a private or shared key; only public keys belong here")
    if not all(isinstance(jwk.get(name), str | None) for name in ("kid", "alg", "use")):
        raise UnusableKeyError("has a kid, alg or use that is not text")
    if jwk.get("use") not in {None, "sig"}:
        raise UnusableKeyError("is not meant for signatures (use)")
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise UnusableKeyError("is not meant for verifying (key_ops)")


def _fitting_algorithms(public_key: PublicKey) -> frozenset[str]:
    if isinstance(public_key, RSAPublicKey):
        if not MIN_RSA_BITS <= public_key.key_size <= MAX_RSA_BITS:
            raise UnusableKeyError(
                f"is an RSA key of {public_key.key_size} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} "
                "are accepted"
            )
        return _RSA_ALGORITHMS
    if isinstance(public_key, EllipticCurvePublicKey):
        algorithm = _CURVE_ALGORITHM.get(public_key.curve.name)
        if algorithm is None:
            raise UnusableKeyError(
                f"is on the curve {public_key.curve.name}, which is not supported"
            )
        return frozenset({algorithm})
    return frozenset({"EdDSA"})
