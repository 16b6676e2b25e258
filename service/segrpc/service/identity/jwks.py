"""The public keys of a token issuer: a JSON Web Key Set in a file, or at a URL."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import jwt

from segrpc.service.errors import CredentialInvalidError, IdentityUnavailableError
from segrpc.service.identity.watched import Watched

log = logging.getLogger("segrpc.identity")

# Asymmetric ones only: with a symmetric one the issuer's public key would be the secret.
ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
MAX_AGE = 600.0  # seconds: how long a key may be used that its issuer has withdrawn
FETCH_TIMEOUT = 5.0  # seconds
MAX_BYTES = 2**20


class KeySet:
    """The keys of a set that can verify signatures.

    Args:
        text: The set in JSON.

    Raises:
        ValueError: If it is no key set, or has no key that can be used.
    """

    def __init__(self, text: str | bytes) -> None:
        try:
            entries = list(json.loads(text)["keys"])
        except (ValueError, KeyError, TypeError):
            raise ValueError("is no JSON Web Key Set") from None
        usable = [key for entry in entries if (key := _usable(entry)) is not None]
        if not usable:
            raise ValueError(f"has no public key for one of the algorithms {', '.join(ALGORITHMS)}")
        self._keys = {key.key_id: key for key in usable}
        self._only = usable[0] if len(usable) == 1 else None

    def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return a key; for a token that names none the only one there is."""
        return self._only if key_id is None else self._keys.get(key_id)


def _usable(entry: object) -> jwt.PyJWK | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK(entry)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None  # of a kind that this version does not know: no reason to give up the others
    return key if key.algorithm_name in ALGORITHMS else None


class KeySource(Protocol):
    """Where an issuer's keys come from."""

    async def find(self, key_id: str | None) -> jwt.PyJWK:
        """Return a key.

        Raises:
            CredentialInvalidError: If the issuer has no such key.
            IdentityUnavailableError: If that cannot be found out at the moment.
        """


class JwksFile:
    """Keys in a file, read again when it changes.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no key set.
    """

    def __init__(self, file: Path) -> None:
        self._set = Watched([file], lambda: KeySet(file.read_bytes()))

    async def find(self, key_id: str | None) -> jwt.PyJWK:
        """See `KeySource`."""
        return _published(self._set.get().find(key_id))


class JwksUrl:
    """Keys at a URL, kept, and fetched again for a key that is unknown and when they are old.

    Tokens name the key that they want, and anybody can write a token: the interval keeps strangers from making the
    server ask the issuer all the time.

    Args:
        url: The URL.
        interval: Seconds between two attempts to fetch, at least.
        fetch: Gets the text of a URL; may block.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        url: str,
        interval: float,
        fetch: Callable[[str], bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._interval = interval
        self._fetch = fetch or fetch_text
        self._clock = clock
        self._set: KeySet | None = None
        self._fetched = self._tried = float("-inf")
        self._failed = False
        self._lock = asyncio.Lock()

    async def find(self, key_id: str | None) -> jwt.PyJWK:
        """See `KeySource`."""
        known = self._known(key_id)
        # One caller pays for looking whether a key still holds; the others go on with it meanwhile.
        if known is None or (self._is_old and not self._lock.locked()):
            async with self._lock:
                # Whoever waited here may find what the one before fetched.
                may_try = self._clock() >= self._tried + self._interval
                if may_try and (self._is_old or self._known(key_id) is None):
                    await self._refresh()
            known = self._known(key_id)
        if known is None and self._failed:
            raise IdentityUnavailableError("the token's issuer cannot be asked for its keys; try again", self._interval)
        return _published(known)

    def _known(self, key_id: str | None) -> jwt.PyJWK | None:
        return None if self._set is None else self._set.find(key_id)

    @property
    def _is_old(self) -> bool:
        return self._clock() >= self._fetched + MAX_AGE

    async def _refresh(self) -> None:
        self._tried = self._clock()
        try:
            self._set = KeySet(await asyncio.to_thread(self._fetch, self._url))
        except (OSError, ValueError) as error:
            self._failed = True
            log.error("cannot read the keys at %s; those that were read before stay: %s", self._url, error)
        else:
            self._failed, self._fetched = False, self._tried


def fetch_text(url: str) -> bytes:
    """Get the text of a URL, without following redirects.

    Raises:
        OSError: If it does not answer, or not with success.
        ValueError: If it is too long.
    """
    import httpx  # here: it takes longer to import than gRPC, and most servers have no such URL

    # A proxy of the environment has no business on the loopback interface, the only one where plain http is allowed.
    is_https = url.startswith("https:")
    try:
        with httpx.stream("GET", url, timeout=FETCH_TIMEOUT, trust_env=is_https) as response:
            response.raise_for_status()
            text = b""
            for part in response.iter_bytes():
                text += part
                if len(text) > MAX_BYTES:
                    raise ValueError(f"is longer than {MAX_BYTES} bytes")
    except httpx.HTTPError as error:
        raise OSError(str(error)) from error
    return text


def _published(key: jwt.PyJWK | None) -> jwt.PyJWK:
    if key is None:
        raise CredentialInvalidError("the token is signed with a key that its issuer does not publish")
    return key
