"""From the credentials of a call to its principal."""

from collections.abc import Sequence

from segrpc.service.errors import CredentialInvalidError, CredentialMissingError
from segrpc.service.identity.jwt import JwtVerifier
from segrpc.service.identity.keys import Keys
from segrpc.service.identity.principal import ANONYMOUS, Principal, name_of
from segrpc.service.identity.watched import Watched

SCHEME = "Bearer"


class Authenticator:
    """Finds out who calls. With none of the three ways everybody is `ANONYMOUS`.

    A token says more than the certificate of the connection that it came on, which may be a gateway's: where there is a
    token, it counts, and a bad one is refused whatever the certificate.

    Args:
        keys: The static keys, if any.
        tokens: Verifies JSON Web Tokens, if they are taken.
        certificates: Whether the name in a verified client certificate is a credential.
    """

    def __init__(self, keys: Watched[Keys] | None, tokens: JwtVerifier | None, *, certificates: bool) -> None:
        self._keys = keys
        self._tokens = tokens
        self._certificates = certificates

    async def authenticate(self, authorization: Sequence[str], certificate: str | None) -> Principal:
        """Return who calls.

        Args:
            authorization: The values of the call's ``authorization`` metadata.
            certificate: The name in the client's certificate, which was verified; None without one.

        Raises:
            CredentialMissingError: If there is no credential.
            CredentialInvalidError: If it is wrong.
            CredentialExpiredError: If it is not valid any more.
            IdentityUnavailableError: If it cannot be judged at the moment.
        """
        if self._keys is None and self._tokens is None:
            if not self._certificates:
                return ANONYMOUS
        elif authorization:
            return await self._bearer(_token(authorization))
        if self._certificates and certificate is not None:
            return Principal(name_of("certificate", certificate))
        raise CredentialMissingError(f"a credential is required: metadata 'authorization: {SCHEME} <token>'")

    def renew(self, principal: Principal, authorization: Sequence[str]) -> Principal:
        """Return who a caller is by now, whose call takes long. Cheap enough for every message.

        Keys are looked at again. Tokens and certificates are not: they are withdrawn by expiring, and work that goes
        on outlives them.

        Args:
            principal: What `authenticate` found.
            authorization: What it was given.

        Raises:
            CredentialInvalidError: If the key was withdrawn, or is another principal's now.
        """
        if self._keys is None or principal.kind != "key":
            return principal
        known = self._keys.get().find(_token(authorization))
        if known is None or known.name != principal.name:
            raise CredentialInvalidError("the key was withdrawn")
        return known

    async def _bearer(self, token: str) -> Principal:
        known = None if self._keys is None else self._keys.get().find(token)
        if known is not None:
            return known
        if self._tokens is None:
            raise CredentialInvalidError("the key is unknown, or was withdrawn")
        return await self._tokens.verify(token)


def _token(authorization: Sequence[str]) -> str:
    if len(authorization) > 1:
        raise CredentialInvalidError("there is more than one 'authorization'")
    scheme, _, token = authorization[0].strip().partition(" ")
    if scheme.lower() != SCHEME.lower() or not token.strip():
        raise CredentialInvalidError(f"'authorization' must be '{SCHEME} <token>'")
    return token.strip()
