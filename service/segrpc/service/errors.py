"""What can go wrong, as exceptions that know nothing of gRPC.

Every exception names its ``reason``, the word that programs act upon, and may name the fields that were wrong. One
table in ``rpc/status.py`` turns the branches of this tree into gRPC statuses::

    SegrpcError
    ├── InvalidInputError              the request is wrong; sending it again will not help
    │   ├── MalformedMessageError      MALFORMED_MESSAGE
    │   ├── InvalidFieldError          INVALID_FIELD
    │   ├── ImageUndecodableError      IMAGE_UNDECODABLE
    │   ├── ImageTooLargeError         IMAGE_TOO_LARGE
    │   ├── EmbeddingMismatchError     EMBEDDING_MISMATCH
    │   ├── ConfigNotFirstError        CONFIG_NOT_FIRST
    │   ├── ChunkOffsetError           CHUNK_OFFSET
    │   └── DigestMismatchError        DIGEST_MISMATCH
    ├── UnauthenticatedError           who calls is not known
    │   ├── CredentialMissingError     CREDENTIAL_MISSING
    │   ├── CredentialInvalidError     CREDENTIAL_INVALID
    │   └── CredentialExpiredError     CREDENTIAL_EXPIRED
    ├── NotAllowedError                the policy forbids it
    │   ├── UriNotAllowedError         URI_NOT_ALLOWED
    │   ├── MethodNotAllowedError      METHOD_NOT_ALLOWED
    │   └── ModelNotAllowedError       MODEL_NOT_ALLOWED
    ├── PreconditionError              the request is right, but not here or not now
    │   ├── ImageFetchError            IMAGE_FETCH_FAILED
    │   ├── CapabilityMissingError     CAPABILITY_MISSING
    │   └── NoPredictorStateError      NO_PREDICTOR_STATE
    ├── NotFoundError                  a name that means nothing here
    │   ├── ImageNotFoundError         IMAGE_NOT_FOUND
    │   ├── ModelNotFoundError         MODEL_NOT_FOUND
    │   └── SessionNotFoundError       SESSION_NOT_FOUND
    ├── ConflictError                  somebody else did something meanwhile
    │   └── SessionTakenError          SESSION_TAKEN
    ├── ExhaustedError                 no room; may work later
    │   ├── OverloadedError            OVERLOADED
    │   └── OutOfMemoryError           OUT_OF_MEMORY
    ├── UnavailableError               nobody here to answer; may work later
    │   ├── DrainingError              DRAINING
    │   ├── WorkerUnavailableError     WORKER_UNAVAILABLE
    │   └── IdentityUnavailableError   IDENTITY_UNAVAILABLE
    ├── DeadlineError                  the caller's time is over
    ├── ConfigurationError             settings that do not go together; seen by the operator, not by clients
    └── ModelLoadError                 a model cannot be loaded; seen by the operator, not by clients
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """A field that is wrong.

    ``field`` is its path: in the models' terms (``points[0][2][0]``) when raised below ``rpc``, in the request's terms
    (``prompts[0].points[2].x``) once a servicer has translated it. ``description`` says what is wrong and what would be
    right.
    """

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit that is somebody's own.

    Attributes:
        subject: The principal's name.
        description: How much it may have of what.
    """

    subject: str
    description: str


class SegrpcError(Exception):
    """The root of all errors that the service raises on purpose.

    Args:
        message: What was wrong, where, and what would be right, for the person who reads it.
        violations: The fields that were wrong, if any.
    """

    reason: ClassVar[str] = ""

    def __init__(self, message: str, violations: Iterable[Violation] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)


class InvalidInputError(SegrpcError):
    """The request is wrong; sending it again will not help."""


class MalformedMessageError(InvalidInputError):
    """The bytes are no message of the expected type."""

    reason = "MALFORMED_MESSAGE"


class InvalidFieldError(InvalidInputError):
    """Fields are missing, out of range, not finite or of the wrong shape."""

    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, field: str, description: str) -> "InvalidFieldError":
        """Make the error for a single field."""
        return cls.of_all([Violation(field, description)])

    @classmethod
    def of_all(cls, violations: Iterable[Violation]) -> "InvalidFieldError":
        """Make the error for several fields at once."""
        found = tuple(violations)
        return cls("; ".join(f"{v.field}: {v.description}" for v in found[:3]), found)


class ImageUndecodableError(InvalidInputError):
    """The bytes are no image of a supported format, or are truncated."""

    reason = "IMAGE_UNDECODABLE"


class ImageTooLargeError(InvalidInputError):
    """The image has too many bytes or pixels."""

    reason = "IMAGE_TOO_LARGE"


class EmbeddingMismatchError(InvalidInputError):
    """A given embedding does not fit the model or the image."""

    reason = "EMBEDDING_MISMATCH"


class ConfigNotFirstError(InvalidInputError):
    """A stream did not begin with its header, or repeated it."""

    reason = "CONFIG_NOT_FIRST"


class ChunkOffsetError(InvalidInputError):
    """A chunk does not follow the one before it, or runs past the announced size."""

    reason = "CHUNK_OFFSET"


class DigestMismatchError(InvalidInputError):
    """The bytes that arrived are not those that were announced."""

    reason = "DIGEST_MISMATCH"


class UnauthenticatedError(SegrpcError):
    """Who calls is not known."""


class CredentialMissingError(UnauthenticatedError):
    """The call has no credential."""

    reason = "CREDENTIAL_MISSING"


class CredentialInvalidError(UnauthenticatedError):
    """The credential is wrong: unknown, withdrawn, forged, or meant for somebody else."""

    reason = "CREDENTIAL_INVALID"


class CredentialExpiredError(UnauthenticatedError):
    """The credential was valid, and is not any more."""

    reason = "CREDENTIAL_EXPIRED"


class NotAllowedError(SegrpcError):
    """The policy forbids it."""


class UriNotAllowedError(NotAllowedError):
    """The policy does not allow this path or URL."""

    reason = "URI_NOT_ALLOWED"


class MethodNotAllowedError(NotAllowedError):
    """The caller may not call this method."""

    reason = "METHOD_NOT_ALLOWED"


class ModelNotAllowedError(NotAllowedError):
    """The caller may not use this model."""

    reason = "MODEL_NOT_ALLOWED"


class PreconditionError(SegrpcError):
    """The request is right, but not here or not now."""


class ImageFetchError(PreconditionError):
    """An allowed URL did not give an image."""

    reason = "IMAGE_FETCH_FAILED"


class CapabilityMissingError(PreconditionError):
    """The model cannot do what was asked."""

    reason = "CAPABILITY_MISSING"


class NoPredictorStateError(PreconditionError):
    """There is no current image to keep."""

    reason = "NO_PREDICTOR_STATE"


class NotFoundError(SegrpcError):
    """A name that means nothing here."""


class ImageNotFoundError(NotFoundError):
    """No image of this digest is at hand."""

    reason = "IMAGE_NOT_FOUND"


class ModelNotFoundError(NotFoundError):
    """No model of this name is served."""

    reason = "MODEL_NOT_FOUND"


class SessionNotFoundError(NotFoundError):
    """No session of this name is at hand."""

    reason = "SESSION_NOT_FOUND"


class ConflictError(SegrpcError):
    """Somebody else did something meanwhile."""


class SessionTakenError(ConflictError):
    """The session was resumed on another stream."""

    reason = "SESSION_TAKEN"


class _RetryableError(SegrpcError):
    """An error that may pass.

    Args:
        message: As in `SegrpcError`.
        retry_after: Seconds after which another try makes sense, or None if nobody knows.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ExhaustedError(_RetryableError):
    """No room; may work later."""


class OverloadedError(ExhaustedError):
    """The queue, the memory or another budget is full.

    Args:
        message: As in `SegrpcError`.
        retry_after: Seconds after which another try makes sense, or None if nobody knows.
        quota: Whose own limit is reached, and which it is; None if it is nobody's own.
    """

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after: float | None = None, quota: Quota | None = None) -> None:
        super().__init__(message, retry_after)
        self.quota = quota


class OutOfMemoryError(ExhaustedError):
    """The device ran out of memory even after its caches were emptied."""

    reason = "OUT_OF_MEMORY"


class UnavailableError(_RetryableError):
    """Nobody here to answer; may work later."""


class DrainingError(UnavailableError):
    """The server is shutting down."""

    reason = "DRAINING"


class WorkerUnavailableError(UnavailableError):
    """The process that runs the model cannot be brought back."""

    reason = "WORKER_UNAVAILABLE"


class IdentityUnavailableError(UnavailableError):
    """The authority that knows whether a credential is valid cannot be asked."""

    reason = "IDENTITY_UNAVAILABLE"


class DeadlineError(SegrpcError):
    """The caller's deadline passed, or the caller left, before the work was done."""


class ConfigurationError(SegrpcError):
    """Settings do not go together, or a file that they name cannot be used."""


class ModelLoadError(SegrpcError):
    """A model cannot be loaded: a missing file, a wrong name, a corrupt checkpoint."""
