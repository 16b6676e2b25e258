"""The one table from errors to gRPC statuses, and the rich details of AIP-193."""

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from segrpc.service.errors import (
    ConflictError,
    CredentialMissingError,
    DeadlineError,
    ExhaustedError,
    InvalidInputError,
    NotAllowedError,
    NotFoundError,
    PreconditionError,
    SegrpcError,
    UnauthenticatedError,
    UnavailableError,
)

ERROR_DOMAIN = "segrpc.v1"
DETAILS_KEY = "grpc-status-details-bin"
CHALLENGE_KEY = "www-authenticate"

CODES: dict[type[SegrpcError], grpc.StatusCode] = {
    InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    NotAllowedError: grpc.StatusCode.PERMISSION_DENIED,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.ABORTED,
    ExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
}

# Trailers above about 8 KB are dropped on the way: texts and lists in details are kept short.
_MAX_TEXT = 400
_MAX_VIOLATIONS = 8


def code_of(error: SegrpcError) -> grpc.StatusCode:
    """Find an error's status code: that of the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def status_of(error: SegrpcError, request_id: str) -> status_pb2.Status:
    """Make the rich status of an error: ErrorInfo, and what else applies of the details below."""
    details: list[message.Message] = []
    if error.reason:
        details.append(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=_short(v.description))
                    for v in error.violations[:_MAX_VIOLATIONS]
                ]
            )
        )
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    quota = getattr(error, "quota", None)
    if quota is not None:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=quota.subject, description=_short(quota.description)
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    return _status(code_of(error), error.message, details)


def challenge_of(error: SegrpcError) -> str:
    """Return what RFC 6750 says to a caller who is not known, for programs that act upon it; empty for other errors."""
    if not isinstance(error, UnauthenticatedError):
        return ""
    return 'Bearer realm="segrpc"' + ("" if isinstance(error, CredentialMissingError) else ', error="invalid_token"')


def internal_status(error_id: str) -> status_pb2.Status:
    """Make the status of a bug: an id that the log has, and nothing of what happened."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=ERROR_DOMAIN, metadata={"error_id": error_id})
    text = f"an error of the service; its log has the details under the id {error_id}"
    return _status(grpc.StatusCode.INTERNAL, text, [info])


def _status(code: grpc.StatusCode, text: str, details: list[message.Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=_short(text))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."
