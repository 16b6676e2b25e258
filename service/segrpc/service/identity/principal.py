"""Who calls."""

from dataclasses import dataclass
from typing import Final

from segrpc.service.errors import CredentialInvalidError, MethodNotAllowedError, ModelNotAllowedError

MAX_NAME = 256  # characters
KINDS: Final = ("key", "jwt", "certificate")  # of credentials, which names begin with


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller. What a caller makes belongs to its `name`.

    Attributes:
        name: How the caller was identified, and as whom: ``key:alice``, ``jwt:4711``, ``certificate:camera-7``. The
            kinds are apart, so that nobody becomes somebody else by getting the same name from another authority.
            Empty where callers are not identified.
        methods: The methods that it may call, such as ``Segment``; None for all.
        models: The models that it may use; None for all.
    """

    name: str
    methods: frozenset[str] | None = None
    models: frozenset[str] | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`; empty where callers are not identified."""
        return self.name.partition(":")[0]

    def check_method(self, method: str) -> None:
        """Raise MethodNotAllowedError if it may not call a method."""
        if self.methods is not None and method not in self.methods:
            raise MethodNotAllowedError(f"{self.name!r} may not call {method}")

    def may_use(self, model: str) -> bool:
        """Tell whether it may use a model."""
        return self.models is None or model in self.models

    def check_model(self, model: str) -> None:
        """Raise ModelNotAllowedError if it may not use a model."""
        if not self.may_use(model):
            raise ModelNotAllowedError(f"{self.name!r} may not use model {model!r}")


ANONYMOUS: Final = Principal("")
"""Everybody, where callers are not identified."""


def name_of(kind: str, name: str) -> str:
    """Return a principal's name.

    Args:
        kind: What identified it.
        name: The name that it has there, which others chose: it goes into logs, and must not be able to forge lines.

    Raises:
        CredentialInvalidError: If it is empty, too long, or not printable.
    """
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise CredentialInvalidError(f"the credential's name must have 1 to {MAX_NAME} printable characters")
    return f"{kind}:{name}"
