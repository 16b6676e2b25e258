"""Static keys: random secrets whose hashes are in a file.

The file has a table for each key; several keys may have one principal, so that keys can be changed without a gap::

    [[keys]]
    principal = "alice"
    sha256 = "<64 hexadecimal digits>"
    methods = ["Segment", "EncodeImage"]  # optional: the only methods it may call
    models = ["sam2.1-hiera-tiny"]        # optional: the only models it may use

A single SHA-256 is enough at rest. Slow, salted hashes protect secrets that can be guessed; a key is 256 random bits:
nobody can try a noticeable part of them at whatever speed, and no two are the same. And it is computed for every call.
"""

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from segrpc.service.identity.principal import Principal, name_of
from segrpc.service.schemas import violations_of

PREFIX = "segrpc_"  # lets people, and scanners that look for leaked secrets, tell what it is
KEY_BYTES = 32


def new_key() -> str:
    """Make a key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    """Return what the file has of a key: 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def toml_of(principal: str, key: str) -> str:
    """Return the table of a key for the file.

    Raises:
        CredentialInvalidError: If the name cannot be a principal's.
    """
    name_of("key", principal)
    escaped = principal.replace("\\", "\\\\").replace('"', '\\"')
    return f'[[keys]]\nprincipal = "{escaped}"\nsha256 = "{hash_of(key)}"\n'


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    principal: str = Field(min_length=1, max_length=128)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    methods: frozenset[str] | None = None
    models: frozenset[str] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[_Key, ...] = ()


class Keys:
    """The keys that are valid.

    Args:
        principals: Hashes, as `hash_of` makes them, each with the principal who has the key.
    """

    def __init__(self, principals: Sequence[tuple[str, Principal]]) -> None:
        self._principals = tuple(principals)

    def __len__(self) -> int:
        return len(self._principals)

    def find(self, key: str) -> Principal | None:
        """Return who has a key, or None if it is not valid.

        All hashes are compared, each in constant time: how long it takes says nothing about which came close.
        """
        given, found = hash_of(key), None
        for known, principal in self._principals:
            if hmac.compare_digest(known, given):
                found = principal
        return found


def read_keys(file: Path, methods: Collection[str]) -> Keys:
    """Read a file of keys.

    Args:
        file: The file.
        methods: The names of all methods, to tell mistyped ones.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not as the module describes it; the text has nothing of its contents.
    """
    try:
        found = _File.model_validate(tomllib.loads(file.read_text("utf-8")))
    except ValidationError as error:
        # Not the error's own text, which quotes the values.
        raise ValueError("; ".join(f"{v.field}: {v.description}" for v in violations_of(error))) from None
    hashes = [key.sha256 for key in found.keys]
    if len(set(hashes)) != len(hashes):
        raise ValueError("keys: two have the same sha256")
    for i, key in enumerate(found.keys):
        unknown = (key.methods or frozenset()) - set(methods)
        if unknown:
            raise ValueError(f"keys[{i}].methods: no method {sorted(unknown)[0]!r}; there are {', '.join(methods)}")
    return Keys([(key.sha256, Principal(name_of("key", key.principal), key.methods, key.models)) for key in found.keys])
