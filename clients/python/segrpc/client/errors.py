"""What a call can raise.

::

    SegmentationError
    ├── InvalidRequestError      the request is wrong; `violations` name the fields
    ├── PermissionDeniedError    the server's policy or the credential forbids it
    ├── UnauthenticatedError     no credential, or a bad one
    ├── NotFoundError            an image, model or session that the server does not know
    ├── PreconditionError        right, but not here or not now: an ability that the model lacks, a URL that fails
    ├── OverloadedError          no room; `retry_after` says when to try again
    ├── UnavailableError         no server, one that is shutting down, or a connection that broke
    ├── DeadlineExceededError    the timeout passed
    ├── UnimplementedError       the server does not know the method
    ├── EditRejectedError        one edit of an interactive session was wrong, or cancelled; the session goes on
    ├── SessionTakenError        the interactive session was resumed elsewhere
    ├── SessionClosedError       the interactive session was finished or detached here
    └── ServerError              a bug of the server, or anything else
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

ERROR_DOMAIN = "segrpc.v1"
# The server always gives a reason. Without one these are of gRPC itself, and say that a call did not get through:
# INTERNAL here, when the connection broke while it was sending; CANCELLED there, when more calls came than it can keep.
_OF_GRPC = (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
CANCELLED = "CANCELLED"  # EditRejected.reason after a cancel


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field that was wrong.

    Attributes:
        field: Its path in the request, such as ``prompts[0].points[2].x``.
        description: What is wrong and what would be right.
    """

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class _Details:
    """What the details of a status say."""

    reason: str = ""
    violations: tuple[FieldViolation, ...] = ()
    retry_after: float | None = None
    request_id: str = ""


class SegmentationError(Exception):
    """A call that failed.

    Attributes:
        message: What was wrong, for people.
        code: The gRPC status code.
        reason: What was wrong, for programs, such as ``IMAGE_NOT_FOUND``; empty if the server did not say.
        violations: The fields that were wrong.
        retry_after: Seconds after which another try makes sense, or None.
        request_id: The id of the request, which the server's log has; empty if unknown.
    """

    codes: ClassVar[tuple[grpc.StatusCode, ...]] = ()

    def __init__(self, message: str, code: grpc.StatusCode, details: _Details = _Details()) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = details.reason
        self.violations = details.violations
        self.retry_after = details.retry_after
        self.request_id = details.request_id

    def __str__(self) -> str:
        return f"{self.message} [{self.reason or self.code.name}]"


class InvalidRequestError(SegmentationError):
    """The request is wrong; `violations` name the fields."""

    codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)


class PermissionDeniedError(SegmentationError):
    """The server's policy or the credential forbids it."""

    codes = (grpc.StatusCode.PERMISSION_DENIED,)


class UnauthenticatedError(SegmentationError):
    """No credential, or a bad one."""

    codes = (grpc.StatusCode.UNAUTHENTICATED,)


class NotFoundError(SegmentationError):
    """An image, model or session that the server does not know."""

    codes = (grpc.StatusCode.NOT_FOUND,)


class PreconditionError(SegmentationError):
    """Right, but not here or not now."""

    codes = (grpc.StatusCode.FAILED_PRECONDITION,)


class OverloadedError(SegmentationError):
    """No room; `retry_after` says when to try again."""

    codes = (grpc.StatusCode.RESOURCE_EXHAUSTED,)


class UnavailableError(SegmentationError):
    """No server, one that is shutting down, or a connection that broke."""

    codes = (grpc.StatusCode.UNAVAILABLE,)


class DeadlineExceededError(SegmentationError):
    """The timeout passed."""

    codes = (grpc.StatusCode.DEADLINE_EXCEEDED,)


class UnimplementedError(SegmentationError):
    """The server does not know the method."""

    codes = (grpc.StatusCode.UNIMPLEMENTED,)


class EditRejectedError(SegmentationError):
    """An edit of an interactive session changed nothing: it was wrong, or cancelled. The session goes on.

    Attributes:
        seq: The number of the edit.
    """

    def __init__(self, seq: int, reason: str, message: str, violations: Sequence[FieldViolation] = ()) -> None:
        code = grpc.StatusCode.CANCELLED if reason == CANCELLED else grpc.StatusCode.INVALID_ARGUMENT
        super().__init__(message, code, _Details(reason=reason, violations=tuple(violations)))
        self.seq = seq


class SessionTakenError(SegmentationError):
    """The interactive session was resumed elsewhere."""

    codes = (grpc.StatusCode.ABORTED,)


class SessionClosedError(SegmentationError):
    """The interactive session was finished or detached here."""

    def __init__(self, message: str = "the session was finished or detached") -> None:
        super().__init__(message, grpc.StatusCode.CANCELLED)


class ServerError(SegmentationError):
    """A bug of the server, or anything else."""


def error_from(error: Any) -> SegmentationError:
    """Turn a ``grpc.RpcError`` of either kind of stub into the error of its code."""
    code: grpc.StatusCode = error.code()
    details = _details_of(error)
    if code in _OF_GRPC and not details.reason:
        code = grpc.StatusCode.UNAVAILABLE
    kind = next((k for k in SegmentationError.__subclasses__() if code in k.codes), ServerError)
    return kind(error.details() or code.name, code, details)


def _details_of(error: Any) -> _Details:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # trailers that contradict the status: not of this service
        return _Details()
    info, bad, retry, request = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.RequestInfo(),
    )
    for packed in status.details if status is not None else ():
        for detail in (info, bad, retry, request):
            if packed.Is(detail.DESCRIPTOR):
                packed.Unpack(detail)
    return _Details(
        reason=info.reason if info.domain == ERROR_DOMAIN else "",
        violations=tuple(FieldViolation(v.field, v.description) for v in bad.field_violations),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        request_id=request.request_id,
    )


def no_answer(seconds: float) -> DeadlineExceededError:
    """Return the error of a wait that took too long."""
    return DeadlineExceededError(f"no answer within {seconds:g} s", grpc.StatusCode.DEADLINE_EXCEEDED)
