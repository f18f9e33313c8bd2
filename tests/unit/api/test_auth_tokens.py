"""One test per way a JWT can be wrong, and that no word about it gives the token away."""

from __future__ import annotations

import json
import traceback
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

from gpud.api.auth import Authenticator, AuthError, Reason
from gpud.dev.issuer import Issuer
from gpud.errors import Code

Build = Callable[..., Authenticator]


def b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned(header: object, payload: object = None, signature: bytes = b"x" * 256) -> str:
    return ".".join([b64(json.dumps(header).encode()), b64(json.dumps(payload).encode())]) + (
        f".{b64(signature)}"
    )


def signed(issuer: Issuer, payload: bytes, **header: Any) -> str:
    """Sign any bytes with the issuer's own key."""
    return jwt.PyJWS().encode(
        payload,
        issuer.private_key(issuer.kid),
        algorithm="RS256",
        headers={"kid": issuer.kid, **header},
    )


async def refused(authenticator: Authenticator, token: str, logs: list[Any]) -> AuthError:
    """Have the token refused, and see that nothing of it is told anywhere."""
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate(f"Bearer {token}")
    error = caught.value
    told = "".join(traceback.format_exception(error))
    told += f"{error!r} {vars(error)} {error.www_authenticate} {logs}"
    for piece in (part for part in token.split(".") if len(part) > 8):
        assert piece not in told
    assert error.__context__ is None
    assert authenticator.remembered(f"Bearer {token}") is None
    return error


async def test_alg_none_is_refused(
    authenticator: Authenticator, issuer: Issuer, logs: list[Any]
) -> None:
    claims = jwt.decode(issuer.mint(), options={"verify_signature": False})
    for algorithm in ("none", "None", "NONE", ""):
        for signature in (b"", b"x" * 256):
            token = unsigned({"alg": algorithm, "kid": issuer.kid}, claims, signature)
            assert (await refused(authenticator, token, logs)).reason is Reason.ALGORITHM


async def test_hs256_signed_with_our_public_key_is_refused(
    authenticator: Authenticator, issuer: Issuer, logs: list[Any]
) -> None:
    public_key = issuer.private_key(issuer.kid).public_key()
    pem = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    hmac_algorithm = jwt.get_algorithm_by_name("HS256")
    head = b64(json.dumps({"alg": "HS256", "kid": issuer.kid}).encode())
    body = issuer.mint().split(".")[1]
    signature = hmac_algorithm.sign(f"{head}.{body}".encode(), pem)
    token = f"{head}.{body}.{b64(signature)}"
    assert (await refused(authenticator, token, logs)).reason is Reason.ALGORITHM


async def test_an_algorithm_outside_the_allow_list_is_refused(
    authenticator: Authenticator, issuer: Issuer, logs: list[Any]
) -> None:
    key = issuer.private_key(issuer.kid)
    token = jwt.encode({"sub": "x"}, key, algorithm="RS512", headers={"kid": issuer.kid})
    assert (await refused(authenticator, token, logs)).reason is Reason.ALGORITHM


async def test_an_allowed_algorithm_that_does_not_fit_the_key_is_refused(
    build: Build, issuer: Issuer, logs: list[Any]
) -> None:
    authenticator = build(algorithms=["RS256", "ES256"])
    await authenticator.start()
    key = ec.generate_private_key(ec.SECP256R1())
    token = jwt.encode({"sub": "x"}, key, algorithm="ES256", headers={"kid": issuer.kid})
    assert (await refused(authenticator, token, logs)).reason is Reason.ALGORITHM


async def test_an_allowed_algorithm_other_than_the_keys_own_is_refused(
    build: Build, issuer: Issuer, logs: list[Any]
) -> None:
    authenticator = build(algorithms=["RS256", "PS256"])  # the JWK says "alg": "RS256"
    await authenticator.start()
    key = issuer.private_key(issuer.kid)
    token = jwt.encode({"sub": "x"}, key, algorithm="PS256", headers={"kid": issuer.kid})
    assert (await refused(authenticator, token, logs)).reason is Reason.ALGORITHM


async def test_another_key_under_our_kid_is_refused(
    authenticator: Authenticator,
    issuer: Issuer,
    signing_keys: list[rsa.RSAPrivateKey],
    logs: list[Any],
) -> None:
    token = jwt.encode(
        {"sub": "x"}, signing_keys[2], algorithm="RS256", headers={"kid": issuer.kid}
    )
    assert (await refused(authenticator, token, logs)).reason is Reason.SIGNATURE


async def test_a_tampered_payload_is_refused(
    authenticator: Authenticator, issuer: Issuer, logs: list[Any]
) -> None:
    head, _, signature = issuer.mint().split(".")
    other_body = issuer.mint(sub="root").split(".")[1]
    token = f"{head}.{other_body}.{signature}"
    assert (await refused(authenticator, token, logs)).reason is Reason.SIGNATURE


async def test_keys_that_the_token_brings_along_are_ignored(
    authenticator: Authenticator,
    host: Any,
    issuer: Issuer,
    signing_keys: list[rsa.RSAPrivateKey],
    logs: list[Any],
) -> None:
    forger = signing_keys[2]
    brought = {
        "jwk": RSAAlgorithm.to_jwk(forger.public_key(), as_dict=True),
        "jku": f"{issuer.url}/forged",
        "x5u": f"{issuer.url}/forged",
        "x5c": ["MIIB"],
    }
    claims = jwt.decode(issuer.mint(), options={"verify_signature": False})
    for kid in ({"kid": issuer.kid}, {}):
        token = jwt.encode(claims, forger, algorithm="RS256", headers={**brought, **kid})
        assert (await refused(authenticator, token, logs)).reason is Reason.SIGNATURE
    assert not any("forged" in path for path in host.asked)
    # Nor do they harm a token that is good without them.
    await authenticator.authenticate(f"Bearer {issuer.mint(headers=brought)}")


@pytest.mark.parametrize("crit", [["exp"], ["b64"], [], "exp", None, 7])
async def test_any_critical_extension_is_refused(
    authenticator: Authenticator, issuer: Issuer, crit: object, logs: list[Any]
) -> None:
    token = unsigned({"alg": "RS256", "kid": issuer.kid, "crit": crit, "exp": 1})
    assert (await refused(authenticator, token, logs)).reason is Reason.CRITICAL


async def test_an_unencoded_payload_is_refused(
    authenticator: Authenticator, issuer: Issuer, logs: list[Any]
) -> None:
    token = unsigned({"alg": "RS256", "kid": issuer.kid, "b64": False}, {"sub": "somebody"})
    assert (await refused(authenticator, token, logs)).reason is Reason.SIGNATURE


@pytest.mark.parametrize(
    "token",
    [
        "opaque-token-of-some-other-kind",
        "a.b",
        "a.b.c",
        "....",
        "a.b.c.d.e",
        unsigned([]),
        unsigned("RS256"),
        unsigned({}),
        unsigned({"alg": 5}),
        unsigned({"alg": ["RS256"]}),
        unsigned({"alg": "RS256", "kid": 7}),
        unsigned({"alg": "RS256", "kid": {"a": "b"}}),
        b64(b'{"alg":') + ".e30.c2ln",
        b64(b"\xff\xfe") + ".e30.c2ln",
        b64(b"[" * 9000) + ".e30.c2ln",
        b64(b'{"alg":"RS256","n":' + b"9" * 5000 + b"}") + ".e30.c2ln",
    ],
)
async def test_what_is_no_jwt_is_refused(
    authenticator: Authenticator, token: str, logs: list[Any]
) -> None:
    error = await refused(authenticator, token, logs)
    assert (error.reason, error.code) == (Reason.MALFORMED, Code.INVALID_TOKEN)


@pytest.mark.parametrize(
    "payload", [b"", b"null", b"[]", b"not json", b"\xff", b"[" * 9000, b'{"exp":' + b"9" * 5000]
)
async def test_signed_bytes_that_are_no_claims_are_refused(
    authenticator: Authenticator, issuer: Issuer, payload: bytes, logs: list[Any]
) -> None:
    token = signed(issuer, payload)
    assert (await refused(authenticator, token, logs)).code is Code.INVALID_TOKEN


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": None}, Reason.NO_EXPIRY),
        ({"iss": None}, Reason.ISSUER),
        ({"iss": "https://somebody.else"}, Reason.ISSUER),
        ({"aud": None}, Reason.AUDIENCE),
        ({"aud": []}, Reason.AUDIENCE),
        ({"aud": "https://supplier.example/v"}, Reason.AUDIENCE),
        ({"aud": ["https://supplier.example/v1/", "x"]}, Reason.AUDIENCE),
    ],
)
async def test_claims_that_are_not_for_us_are_refused(
    authenticator: Authenticator,
    issuer: Issuer,
    claims: dict[str, Any],
    reason: Reason,
    logs: list[Any],
) -> None:
    assert (await refused(authenticator, issuer.mint(**claims), logs)).reason is reason


async def test_an_issuer_with_a_trailing_slash_is_another_issuer(
    authenticator: Authenticator, issuer: Issuer, logs: list[Any]
) -> None:
    token = issuer.mint(iss=issuer.url + "/")
    assert (await refused(authenticator, token, logs)).reason is Reason.ISSUER


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": "1790003600"},
        {"exp": True},
        {"exp": [1]},
        {"exp": float("nan")},
        {"exp": float("inf")},
        {"exp": 10**400},
        {"nbf": "soon"},
        {"iat": {}},
        {"iss": 5},
        {"iss": ["https://gpu.ai"]},
        {"aud": {"https://supplier.example/v1": 1}},
        {"aud": ["https://supplier.example/v1", 5]},
        {"sub": 5},
        {"client_id": ["supplier-7"]},
    ],
)
async def test_a_claim_of_the_wrong_type_is_refused(
    authenticator: Authenticator, issuer: Issuer, claims: dict[str, Any], logs: list[Any]
) -> None:
    usual = jwt.decode(issuer.mint(), options={"verify_signature": False})
    token = signed(issuer, json.dumps({**usual, **claims}).encode())
    assert (await refused(authenticator, token, logs)).reason is Reason.CLAIM


@pytest.mark.parametrize(
    ("claim", "seconds", "reason"),
    [
        ("exp", -30, Reason.EXPIRED),
        ("exp", -29, None),
        ("nbf", 31, Reason.NOT_YET_VALID),
        ("nbf", 30, None),
        ("iat", 31, Reason.NOT_YET_VALID),
        ("iat", 30, None),
        ("iat", -86400 * 400, None),
        ("iat", None, None),
    ],
)
async def test_times_are_held_to_the_leeway(
    authenticator: Authenticator,
    issuer: Issuer,
    clock: Any,
    claim: str,
    seconds: float | None,
    reason: Reason | None,
    logs: list[Any],
) -> None:
    token = issuer.mint(**{claim: None if seconds is None else clock.now + seconds})
    if reason is None:
        await authenticator.authenticate(f"Bearer {token}")
    else:
        assert (await refused(authenticator, token, logs)).reason is reason


async def test_one_of_several_audiences_is_enough(build: Build, issuer: Issuer) -> None:
    authenticator = build(audience=["a", "b"])
    await authenticator.start()
    await authenticator.authenticate(f"Bearer {issuer.mint(aud=['x', 'b'])}")
    await authenticator.authenticate(f"Bearer {issuer.mint(aud='a')}")


@pytest.mark.parametrize(
    ("claims", "accepted"),
    [
        ({"client_id": "gpu-ai"}, True),
        ({"client_id": None, "azp": "gpu-ai"}, True),
        ({"client_id": None, "sub": "gpu-ai"}, True),
        ({"client_id": "somebody"}, False),
        ({"client_id": "somebody", "azp": "gpu-ai", "sub": "gpu-ai"}, False),
        ({"client_id": None, "sub": None}, False),
        ({"client_id": "gpu-a"}, False),
    ],
)
async def test_only_configured_clients_are_accepted(
    build: Build, issuer: Issuer, claims: dict[str, Any], accepted: bool, logs: list[Any]
) -> None:
    authenticator = build(client_ids=["other", "gpu-ai"])
    await authenticator.start()
    token = issuer.mint(**claims)
    if accepted:
        caller = await authenticator.authenticate(f"Bearer {token}")
        assert caller.client_id == "gpu-ai"
    else:
        assert (await refused(authenticator, token, logs)).reason is Reason.CLIENT


@pytest.mark.parametrize(
    ("claims", "accepted"),
    [
        ({"scope": "gpu:read gpu:write extra"}, True),
        ({"scp": ["gpu:read", "gpu:write"]}, True),
        ({"scp": "gpu:write gpu:read"}, True),
        ({"scope": "gpu:read"}, False),
        ({"scope": "gpu:readgpu:write"}, False),
        ({"scope": "", "scp": ["gpu:read", "gpu:write"]}, False),
        ({}, False),
    ],
)
async def test_every_configured_scope_is_needed(
    build: Build, issuer: Issuer, claims: dict[str, Any], accepted: bool, logs: list[Any]
) -> None:
    authenticator = build(scopes=["gpu:read", "gpu:write"])
    await authenticator.start()
    token = issuer.mint(**claims)
    if accepted:
        await authenticator.authenticate(f"Bearer {token}")
    else:
        assert (await refused(authenticator, token, logs)).code is Code.INSUFFICIENT_SCOPE
