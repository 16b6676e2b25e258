"""JSON Web Tokens of an issuer that the operator trusts."""

from collections.abc import Mapping
from typing import Any

import jwt

from segrpc.service.errors import CredentialExpiredError, CredentialInvalidError
from segrpc.service.identity.jwks import ALGORITHMS, KeySource
from segrpc.service.identity.principal import Principal, name_of

LEEWAY = 30.0  # seconds that the issuer's clock and ours may differ
METHODS_CLAIM = "segrpc_methods"
MODELS_CLAIM = "segrpc_models"

_REQUIRED = ["exp", "iss", "aud", "sub"]

# Own words: those of PyJWT may quote the token. The first that fits counts.
_TEXTS: dict[type[Exception], str] = {
    jwt.InvalidAudienceError: "is meant for another audience",
    jwt.InvalidIssuerError: "comes from another issuer",
    jwt.ImmatureSignatureError: "is not valid yet",
    jwt.InvalidSignatureError: "does not have the signature of its issuer",
    jwt.InvalidAlgorithmError: f"is not signed with the algorithm of its key, which is one of {', '.join(ALGORITHMS)}",
}


class JwtVerifier:
    """Verifies tokens.

    Args:
        issuer: Whose tokens are taken: the claim ``iss``.
        audience: For whom they must be meant: the claim ``aud``.
        keys: The issuer's keys.
    """

    def __init__(self, issuer: str, audience: str, keys: KeySource) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys = keys

    async def verify(self, token: str) -> Principal:
        """Return who a token names in ``sub``.

        The claims ``segrpc_methods`` and ``segrpc_models``, lists of names, restrict what its bearer may do.

        Raises:
            CredentialExpiredError: If it was valid, and is not any more.
            CredentialInvalidError: If it is wrong in any other way.
            IdentityUnavailableError: If the issuer's keys cannot be had.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise CredentialInvalidError("the token is neither a known key nor a JSON Web Token") from None
        # Before a key is looked for: such a token is no reason to ask the issuer.
        if header.get("alg") not in ALGORITHMS:
            raise CredentialInvalidError(f"the token {_TEXTS[jwt.InvalidAlgorithmError]}")
        key_id = header.get("kid")
        key = await self._keys.find(key_id if isinstance(key_id, str) else None)
        try:
            # Given as a PyJWK, the key says which algorithm the token must have.
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": _REQUIRED},
            )
        except jwt.ExpiredSignatureError:
            raise CredentialExpiredError("the token has expired; get a new one") from None
        except jwt.MissingRequiredClaimError as error:
            raise CredentialInvalidError(f"the token has no claim {error.claim!r}") from None
        except (jwt.PyJWTError, TypeError, ValueError) as error:
            text = next((text for kind, text in _TEXTS.items() if isinstance(error, kind)), "is malformed")
            raise CredentialInvalidError(f"the token {text}") from None
        return Principal(name_of("jwt", claims["sub"]), _names(claims, METHODS_CLAIM), _names(claims, MODELS_CLAIM))


def _names(claims: Mapping[str, Any], claim: str) -> frozenset[str] | None:
    if claim not in claims:
        return None
    names = claims[claim]
    # A restriction that is not understood must not be taken for none.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CredentialInvalidError(f"the token's claim {claim!r} must be a list of names")
    return frozenset(names)
