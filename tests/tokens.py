"""An issuer of JSON Web Tokens, for tests."""

import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER, AUDIENCE = "https://issuer.example", "segrpc"


class Issuer:
    """Signs tokens with a key of its own.

    Args:
        key_id: The name of the key.
        algorithm: ``ES256`` or ``RS256``.
    """

    def __init__(self, key_id: str, algorithm: str = "ES256") -> None:
        self.key_id = key_id
        self.algorithm = algorithm
        self._key: Any = (
            ec.generate_private_key(ec.SECP256R1()) if algorithm == "ES256" else rsa.generate_private_key(65537, 2048)
        )

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key."""
        kind: Any = jwt.algorithms.ECAlgorithm if self.algorithm == "ES256" else jwt.algorithms.RSAAlgorithm
        public = json.loads(kind.to_jwk(self._key.public_key()))
        return {**public, "kid": self.key_id, "use": "sig", "alg": self.algorithm}

    @property
    def public_pem(self) -> bytes:
        """The public key as PEM."""
        pem: bytes = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return pem

    def token(self, subject: str = "alice", *, key: Any = None, headers: Any = None, **changes: Any) -> str:
        """Make a token that is valid for a day, but for the changes; None leaves a claim out."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 86_400, **changes}
        given = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(given, key or self._key, self.algorithm, headers={"kid": self.key_id, **(headers or {})})


def key_set(*issuers: Issuer) -> str:
    """The public keys of issuers as a JSON Web Key Set."""
    return json.dumps({"keys": [issuer.jwk for issuer in issuers]})
