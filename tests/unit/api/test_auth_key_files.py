"""Keys from files: what is accepted, what is refused and in which words, and reloading."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from gpud.api.auth import Authenticator, AuthError, Reason
from gpud.api.auth_key_files import load_key_files
from gpud.api.keys import UnusableKeyError, read_jwks
from gpud.dev.issuer import Issuer
from gpud.errors import Code, GpudError

Build = Callable[..., Authenticator]
SPKI = PublicFormat.SubjectPublicKeyInfo


def pem(key: Any, form: PublicFormat = SPKI) -> bytes:
    text: bytes = key.public_key().public_bytes(Encoding.PEM, form)
    return text


def private_pem(key: Any, form: serialization.PrivateFormat) -> bytes:
    text: bytes = key.private_bytes(Encoding.PEM, form, serialization.NoEncryption())
    return text


def certificate(key: rsa.RSAPrivateKey) -> bytes:
    """A self-signed certificate, long expired."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")])
    start = dt.datetime(2001, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def problem(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(GpudError) as caught:
        load_key_files([path])
    assert caught.value.code is Code.CONFIG_INVALID
    (found,) = caught.value.problems
    assert found.where == str(path)
    return found.what


@pytest.fixture
def key(issuer: Issuer) -> rsa.RSAPrivateKey:
    return issuer.private_key(issuer.kid)


@pytest.mark.parametrize(
    "content_of",
    [
        pem,
        lambda key: pem(key, PublicFormat.PKCS1),
        certificate,
        lambda key: b"# the issuer's key\r\n" + pem(key).replace(b"\n", b"\r\n"),
        lambda key: pem(ec.generate_private_key(ec.SECP256R1())) + pem(key),
    ],
    ids=["spki", "pkcs1", "certificate", "crlf", "several"],
)
async def test_a_token_with_a_kid_is_good_under_a_pem_key(
    build: Build,
    issuer: Issuer,
    key: rsa.RSAPrivateKey,
    tmp_path: Path,
    content_of: Callable[[rsa.RSAPrivateKey], bytes],
) -> None:
    path = tmp_path / "issuer.pem"
    path.write_bytes(content_of(key))
    authenticator = build(jwks_url=None, key_files=[path])
    await authenticator.start()
    assert authenticator.ready
    await authenticator.authenticate(f"Bearer {issuer.mint()}")
    await authenticator.authenticate(f"Bearer {issuer.mint(headers={'kid': None})}")


async def test_a_key_without_an_algorithm_of_its_own_is_held_to_the_allow_list(
    build: Build, issuer: Issuer, tmp_path: Path, key: rsa.RSAPrivateKey
) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(pem(key))
    claims = jwt.decode(issuer.mint(), options={"verify_signature": False})
    token = jwt.encode(claims, key, algorithm="RS512")
    strict = build(jwks_url=None, key_files=[path])
    await strict.start()
    with pytest.raises(AuthError) as caught:
        await strict.authenticate(f"Bearer {token}")
    assert caught.value.reason is Reason.ALGORITHM
    lenient = build(jwks_url=None, key_files=[path], algorithms=["RS256", "RS512"])
    await lenient.start()
    await lenient.authenticate(f"Bearer {token}")


async def test_a_jwks_file_holds_tokens_to_their_kid(
    build: Build, issuer: Issuer, tmp_path: Path
) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(issuer.jwks()))
    authenticator = build(jwks_url=None, key_files=[path])
    await authenticator.start()
    await authenticator.authenticate(f"Bearer {issuer.mint()}")
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate(f"Bearer {issuer.mint(headers={'kid': 'x'})}")
    assert caught.value.reason is Reason.UNKNOWN_KEY


@pytest.mark.parametrize(
    ("make_key", "algorithm"),
    [
        (lambda: ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (lambda: ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (ed25519.Ed25519PrivateKey.generate, "EdDSA"),
        (ed448.Ed448PrivateKey.generate, "EdDSA"),
    ],
)
@pytest.mark.parametrize("as_jwk", [False, True])
async def test_every_kind_of_key_verifies_its_algorithm(
    build: Build,
    issuer: Issuer,
    tmp_path: Path,
    make_key: Callable[[], Any],
    algorithm: str,
    as_jwk: bool,
) -> None:
    key, path = make_key(), tmp_path / "key"
    writer = ECAlgorithm if algorithm.startswith("ES") else OKPAlgorithm
    jwk = writer.to_jwk(key.public_key(), as_dict=True)
    path.write_bytes(json.dumps({"keys": [jwk]}).encode() if as_jwk else pem(key))
    authenticator = build(jwks_url=None, key_files=[path], algorithms=["RS256", algorithm])
    await authenticator.start()
    claims = jwt.decode(issuer.mint(), options={"verify_signature": False})
    await authenticator.authenticate(f"Bearer {jwt.encode(claims, key, algorithm=algorithm)}")
    with pytest.raises(AuthError):
        await authenticator.authenticate(f"Bearer {issuer.mint()}")


def test_unusable_files_are_told_all_at_once(tmp_path: Path, key: rsa.RSAPrivateKey) -> None:
    good, empty, absent = tmp_path / "good", tmp_path / "empty", tmp_path / "absent"
    good.write_bytes(pem(key))
    empty.write_bytes(b"")
    with pytest.raises(GpudError) as caught:
        load_key_files([good, empty, absent, tmp_path])
    assert [(found.where, found.what) for found in caught.value.problems] == [
        (str(empty), "holds neither a PEM block nor a JWK Set"),
        (str(absent), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
    ]


@pytest.mark.parametrize(
    "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
)
def test_a_private_key_is_refused_and_not_quoted(
    tmp_path: Path, key: rsa.RSAPrivateKey, form: serialization.PrivateFormat
) -> None:
    text = private_pem(key, form)
    what = problem(tmp_path / "key", pem(key) + text)
    assert what.startswith("holds a private key")
    assert text.decode().splitlines()[1] not in what


def test_a_private_or_shared_jwk_is_refused(tmp_path: Path, key: rsa.RSAPrivateKey) -> None:
    public = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    private = RSAAlgorithm.to_jwk(key, as_dict=True)
    for secret in (private, {"kty": "oct", "k": "c2VjcmV0"}):
        what = problem(tmp_path / "key", json.dumps({"keys": [public, secret]}).encode())
        assert what.startswith("holds a private or shared key")


@pytest.mark.parametrize(
    ("content_of", "what"),
    [
        (lambda key: certificate(key) * 2, "holds several certificates"),
        (lambda key: pem(key).replace(b"MIIB", b"MIIC"), "holds a damaged PUBLIC KEY"),
        (lambda key: certificate(key).replace(b"MII", b"MIX"), "holds a damaged CERTIFICATE"),
        (lambda key: pem(key).replace(b"PUBLIC KEY", b"X509 CRL"), "holds a X509 CRL"),
        (lambda _: b"ssh-rsa AAAA", "holds neither"),
        (lambda key: pem(key) + b" " * 2**20, "is larger than"),
        (lambda _: b'{"keys": [', "is not JSON"),
        (lambda _: b'{"kty": "RSA"}', "is not a JWK Set"),
        (lambda _: b'{"keys": [5]}', "the JWK Set has no usable key; key 0 is not an object"),
        (
            lambda _: pem(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - weak on purpose
            "is an RSA key of 1024 bits; 2048 to 16384 are accepted",
        ),
        (
            lambda _: pem(ec.generate_private_key(ec.SECP256K1())),
            "is on the curve secp256k1, which is not supported",
        ),
        (
            lambda _: pem(dsa.generate_private_key(1024)),  # noqa: S505 - the type is what counts
            "is of a type that no token is signed with",
        ),
    ],
)
def test_a_file_that_holds_no_usable_key_is_refused(
    tmp_path: Path,
    key: rsa.RSAPrivateKey,
    content_of: Callable[[rsa.RSAPrivateKey], bytes],
    what: str,
) -> None:
    assert problem(tmp_path / "key", content_of(key)).startswith(what)


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"kty": "oct"}, "is of a type (kty) that is not supported"),
        ({"kty": ["RSA"]}, "is of a type (kty) that is not supported"),
        ({"use": "enc"}, "is not meant for signatures (use)"),
        ({"key_ops": ["sign"]}, "is not meant for verifying (key_ops)"),
        ({"key_ops": "verify"}, "is not meant for verifying (key_ops)"),
        ({"kid": 5}, "has a kid, alg or use that is not text"),
        ({"alg": []}, "has a kid, alg or use that is not text"),
        ({"alg": "RSA-OAEP"}, "is of a type that does not fit the algorithm it is meant for"),
        ({"alg": "ES256"}, "is of a type that does not fit the algorithm it is meant for"),
        ({"alg": "HS256"}, "is of a type that does not fit the algorithm it is meant for"),
        ({"n": 5}, "is damaged"),
        ({"n": "AQAB"}, "is damaged"),
        ({"e": "!!"}, "is damaged"),
        ({"kty": "EC"}, "is damaged"),
        ({"kty": "OKP", "crv": "X25519", "x": "AAAA"}, "is damaged"),
        ({"d": "AQAB"}, "is a private or shared key; only public keys belong here"),
    ],
)
def test_a_jwk_that_is_not_for_us_is_passed_over(
    issuer: Issuer, members: dict[str, Any], why: str
) -> None:
    (good,) = issuer.jwks()["keys"]
    jwks = read_jwks(json.dumps({"keys": [{**good, **members}, good]}).encode())
    assert jwks.passed_over == (f"key 0 {why}",)
    assert len(jwks.keys.keys) == 1
    with pytest.raises(UnusableKeyError, match="no usable key"):
        read_jwks(json.dumps({"keys": [{**good, **members}]}).encode())


def test_null_members_of_a_jwk_say_nothing(issuer: Issuer) -> None:
    (good,) = issuer.jwks()["keys"]
    jwk = {**good, "kid": None, "alg": None, "use": None, "key_ops": ["verify"]}
    (key,) = read_jwks(json.dumps({"keys": [jwk]}).encode()).keys.keys
    assert key.kid is None
    assert "PS512" in key.algorithms


async def test_unusable_files_stop_the_start(build: Build, tmp_path: Path) -> None:
    authenticator = build(jwks_url=None, key_files=[tmp_path / "absent"])
    with pytest.raises(GpudError, match=r"auth\.key_files"):
        await authenticator.start()
    assert not authenticator.ready
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate("Bearer eyJhbGciOiJSUzI1NiJ9.e30.c2ln")
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.KEYS_UNAVAILABLE, 1)


async def test_a_reload_takes_new_keys_and_forgets_tokens_of_the_old(
    build: Build, issuer: Issuer, tmp_path: Path, key: rsa.RSAPrivateKey
) -> None:
    path, token = tmp_path / "key.pem", issuer.mint()
    path.write_bytes(pem(key))
    authenticator = build(jwks_url=None, key_files=[path])
    await authenticator.start()
    await authenticator.authenticate(f"Bearer {token}")
    await authenticator.reload()
    assert authenticator.remembered(f"Bearer {token}")
    issuer.rotate()
    path.write_bytes(pem(issuer.private_key(issuer.kid)))
    await authenticator.reload()
    assert authenticator.remembered(f"Bearer {token}") is None
    await authenticator.authenticate(f"Bearer {issuer.mint()}")
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate(f"Bearer {token}")
    assert caught.value.reason is Reason.SIGNATURE


async def test_a_failed_reload_keeps_the_keys_in_use(
    build: Build, issuer: Issuer, tmp_path: Path, key: rsa.RSAPrivateKey
) -> None:
    path, token = tmp_path / "key.pem", issuer.mint()
    path.write_bytes(pem(key))
    authenticator = build(jwks_url=None, key_files=[path])
    await authenticator.start()
    await authenticator.authenticate(f"Bearer {token}")
    path.write_bytes(b"")
    with pytest.raises(GpudError):
        await authenticator.reload()
    assert authenticator.remembered(f"Bearer {token}")
    await authenticator.authenticate(f"Bearer {issuer.mint()}")
