"""Tokens, good and bad, and where the keys come from."""

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from segrpc.service.errors import (
    CredentialExpiredError,
    CredentialInvalidError,
    IdentityUnavailableError,
    SegrpcError,
)
from segrpc.service.identity.jwks import MAX_AGE, JwksFile, JwksUrl, KeySet
from segrpc.service.identity.jwt import LEEWAY, JwtVerifier
from segrpc.service.identity.principal import Principal
from tests.tokens import AUDIENCE, ISSUER, Issuer, key_set

GOOD = Issuer("good")
RSA = Issuer("rsa", "RS256")


@pytest.fixture
def verifier(tmp_path: Path) -> JwtVerifier:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(GOOD, RSA))
    return JwtVerifier(ISSUER, AUDIENCE, JwksFile(file))


@pytest.mark.parametrize("issuer", [GOOD, RSA])
async def test_a_token_names_its_principal(verifier: JwtVerifier, issuer: Issuer) -> None:
    assert await verifier.verify(issuer.token("alice")) == Principal("jwt:alice")


async def test_claims_restrict_what_may_be_done(verifier: JwtVerifier) -> None:
    token = GOOD.token(segrpc_methods=["Segment"], segrpc_models=[])
    assert await verifier.verify(token) == Principal("jwt:alice", frozenset({"Segment"}), frozenset())


def encoded(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def unsigned(algorithm: str = "none") -> str:
    payload = GOOD.token().split(".")[1]
    return f"{encoded({'alg': algorithm, 'kid': 'good'})}.{payload}."


def confused(secret: bytes) -> str:
    """A token signed with the public key as if that were a secret; PyJWT itself would refuse to make it."""
    signed = f"{encoded({'alg': 'HS256', 'kid': 'rsa', 'typ': 'JWT'})}.{RSA.token().split('.')[1]}"
    digest = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def tampered() -> str:
    head, _, signature = GOOD.token().split(".")
    return f"{head}.{GOOD.token('root').split('.')[1]}.{signature}"


BAD: dict[str, tuple[str, str]] = {
    "another audience": (GOOD.token(aud="other"), "another audience"),
    "another issuer": (GOOD.token(iss="https://evil.example"), "another issuer"),
    "not yet valid": (GOOD.token(nbf=int(time.time()) + 3600), "not valid yet"),
    "no expiry": (GOOD.token(exp=None), "no claim 'exp'"),
    "no subject": (GOOD.token(sub=None), "no claim 'sub'"),
    "no audience": (GOOD.token(aud=None), "no claim 'aud'"),
    "no issuer": (GOOD.token(iss=None), "no claim 'iss'"),
    "an empty subject": (GOOD.token(""), "printable"),
    "a subject of two lines": (GOOD.token("a\nprincipal='key:root'"), "printable"),
    "methods that are no list": (GOOD.token(segrpc_methods="Segment"), "list of names"),
    "no signature": (unsigned(), "algorithm"),
    "no signature, in capitals": (unsigned("NONE"), "algorithm"),
    "no signature for its algorithm": (unsigned("ES256"), "signature|malformed"),
    "the public key as a secret": (confused(RSA.public_pem), "algorithm"),
    "another algorithm than the key's": (RSA.token(headers={"kid": "good"}), "algorithm"),
    "a stranger's signature": (Issuer("good").token(), "signature"),
    "another payload": (tampered(), "signature"),
    "an unknown key": (Issuer("other").token(), "does not publish"),
    "no token at all": ("segrpc_x", "neither"),
    "three parts of nothing": ("a.b.c", "neither"),
    "nothing": ("", "neither"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_token(verifier: JwtVerifier, case: str) -> None:
    token, expected = BAD[case]
    with pytest.raises(CredentialInvalidError, match=expected) as caught:
        await verifier.verify(token)
    assert not token or token not in caught.value.message


async def test_an_expired_token(verifier: JwtVerifier) -> None:
    with pytest.raises(CredentialExpiredError):
        await verifier.verify(GOOD.token(exp=int(time.time() - LEEWAY - 5)))
    assert await verifier.verify(GOOD.token(exp=int(time.time() - LEEWAY + 15)))
    # Who cannot sign learns nothing, not even that it is too late.
    with pytest.raises(CredentialInvalidError):
        await verifier.verify(Issuer("good").token(exp=1))


async def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(GOOD))
    verifier = JwtVerifier(ISSUER, AUDIENCE, JwksFile(file))
    await verifier.verify(GOOD.token())
    (tmp_path / "new").write_text(key_set(RSA))
    (tmp_path / "new").replace(file)
    await verifier.verify(RSA.token())
    with pytest.raises(CredentialInvalidError):
        await verifier.verify(GOOD.token())


def test_keys_that_cannot_be_used_are_passed_over() -> None:
    secret = {"kty": "oct", "kid": "s", "k": "AAAA", "alg": "HS256"}
    strange: list[Any] = [secret, {"kty": "new"}, 3, {**GOOD.jwk, "kid": "enc", "use": "enc"}]
    keys = KeySet(json.dumps({"keys": [*strange, GOOD.jwk]}))
    assert [keys.find(key_id) is not None for key_id in ("s", "enc", "good", None)] == [False, False, True, True]
    assert KeySet(key_set(GOOD, RSA)).find(None) is None  # which one is not said


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"keys": []}', '{"keys": 3}', '{"keys": [{"kty": "oct"}]}'])
def test_what_is_no_key_set(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON Web Key Set|no public key"):
        KeySet(text)


class Web:
    """A URL, and a clock that the test turns."""

    def __init__(self, text: str) -> None:
        self.text, self.now, self.requests = text, 1000.0, 0

    def fetch(self, url: str) -> bytes:
        self.requests += 1
        if not self.text:
            raise OSError("no route")
        return self.text.encode()

    def source(self) -> JwksUrl:
        return JwksUrl("https://issuer.example/jwks", 30.0, self.fetch, lambda: self.now)


async def refusal(source: JwksUrl, key_id: str) -> type[SegrpcError]:
    with pytest.raises(SegrpcError) as caught:
        await source.find(key_id)
    return type(caught.value)


async def test_an_unknown_key_is_looked_for_but_not_all_the_time() -> None:
    web = Web(key_set(GOOD))
    source = web.source()
    key: jwt.PyJWK = await source.find("good")
    assert (key.key_id, web.requests) == ("good", 1)
    web.text = key_set(GOOD, RSA)
    assert await refusal(source, "rsa") is CredentialInvalidError  # too soon
    web.now += 30
    assert (await source.find("rsa")).key_id == "rsa"
    for i in range(10):
        assert await refusal(source, f"forged-{i}") is CredentialInvalidError
    assert web.requests == 2


async def test_a_withdrawn_key_is_forgotten() -> None:
    web = Web(key_set(GOOD, RSA))
    source = web.source()
    await source.find("good")
    web.text, web.now = key_set(RSA), web.now + MAX_AGE
    assert await refusal(source, "good") is CredentialInvalidError


async def test_an_issuer_that_does_not_answer() -> None:
    web = Web("")
    source = web.source()
    assert await refusal(source, "good") is IdentityUnavailableError
    web.text, web.now = key_set(GOOD), web.now + 30
    await source.find("good")
    web.text, web.now = "", web.now + MAX_AGE
    await source.find("good")  # what was known still counts
    assert await refusal(source, "rsa") is IdentityUnavailableError
    assert web.requests == 3
