"""What must hold of every error that a client may get to see."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import Message

from segrpc.service.errors import SegrpcError
from segrpc.service.rpc.status import code_of, status_of

# What reaches the client beside the status: gRPC drops trailers above 8 KiB, and base64 makes a third more of it.
_MAX_STATUS = 8192 * 3 // 4
_STEP = re.compile(r"(?:^|\.)([a-z_0-9]+)|\[(\d+)\]")


@contextmanager
def refusals(request: Message | None = None) -> Iterator[None]:
    """Swallow the service's own errors, if they are fit to be told to a client who sent ``request``."""
    try:
        yield
    except SegrpcError as error:
        check_refusal(error, request)


def check_refusal(error: SegrpcError, request: Message | None = None) -> None:
    """Check that an error blames the caller, says what was wrong, and names fields that the request has."""
    assert code_of(error) not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert error.reason
    assert error.message
    assert len(status_of(error, "").SerializeToString()) <= _MAX_STATUS
    for violation in error.violations if request is not None else ():
        assert violation.description
        assert _names_a_field(violation.field, request), violation


def _names_a_field(path: str, message: Message | None) -> bool:
    """Tell whether a path such as ``prompts[0].points[2].x`` leads somewhere in a message."""
    assert message is not None
    found: object = message
    end = 0
    for step in _STEP.finditer(path):
        name, index = step.groups()
        if step.start() != end:
            return False
        end = step.end()
        if name is not None:
            if not isinstance(found, Message) or name not in found.DESCRIPTOR.fields_by_name:
                return False
            found = getattr(found, name)
        elif not hasattr(found, "__getitem__") or int(index) >= len(found):  # type: ignore[arg-type]
            return False
        else:
            found = found[int(index)]
    return end == len(path) > 0
