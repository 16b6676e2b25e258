"""Who makes a call: what gRPC's context tells of it, and what handlers are told."""

from collections.abc import Callable
from typing import Any

from segrpc.service.identity.principal import Principal
from segrpc.service.telemetry.call import Call
from segrpc.service.telemetry.trace_parent import TraceParent, parse_trace_parent

AUTHORIZATION = "authorization"
TRACE_PARENT = "traceparent"
COMMON_NAME = "x509_common_name"
ALTERNATIVE_NAME = "x509_subject_alternative_name"


class CallContext:
    """gRPC's context of a call, its principal, and what observers are told of it.

    Args:
        context: gRPC's context.
        principal: Who calls.
        call: What is known of the call; handlers add to it.
        serialise: Turns a response into bytes.
    """

    def __init__(self, context: Any, principal: Principal, call: Call, serialise: Callable[[Any], bytes]) -> None:
        self._context = context
        self._serialise = serialise
        self.principal = principal
        self.call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def caller(self) -> str:
        """Whose names for series of calls these are: the principal's, or without one the connection's.

        Names that strangers choose may collide, connections never do.
        """
        return self.principal.name or str(self._context.peer())

    def serialised(self, response: Any) -> bytes:
        """Turn a response that is about to be sent into bytes, and count them."""
        data = self._serialise(response)
        self.call.sent_bytes += len(data)
        return data

    async def write(self, response: Any) -> None:
        """Send a response of a stream."""
        await self._context.write(self.serialised(response))


def credentials_of(context: Any) -> tuple[list[str], str | None]:
    """Return the values of a call's ``authorization``, and the name in the client's certificate.

    gRPC tells the name only of certificates that it has verified: the subject's common name, or without one the first
    alternative name.
    """
    authorization = [value for key, value in context.invocation_metadata() or () if key == AUTHORIZATION]
    told = context.auth_context()
    # A certificate without a common name has an empty one.
    names = [name for kind in (COMMON_NAME, ALTERNATIVE_NAME) for name in told.get(kind, ()) if name]
    return authorization, names[0].decode("utf-8", "replace") if names else None


def trace_parent_of(context: Any) -> TraceParent | None:
    """Return the caller's span, if the call tells one."""
    values = (str(value) for key, value in context.invocation_metadata() or () if key == TRACE_PARENT)
    return parse_trace_parent(next(values, ""))
