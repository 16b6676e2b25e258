"""What a failed call said, taken apart."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Failure:
    """The status of a failed call."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    fields: tuple[str, ...]
    retry_delay: float | None
    request_id: str


def failure_of(call: Callable[[], Any]) -> Failure:
    """Make a call that must fail, and return its status."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return parse(caught.value)


def parse(error: Any) -> Failure:
    """Take an RpcError apart."""
    info, request, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else ():
        for detail in (info, request, bad, retry):
            if packed.Is(detail.DESCRIPTOR):
                packed.Unpack(detail)
    delay = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
    fields = tuple(violation.field for violation in bad.field_violations)
    return Failure(error.code(), error.details(), info.reason, info.domain, fields, delay, request.request_id)


def chunks(data: bytes, size: int) -> Iterable[tuple[int, bytes]]:
    """Cut data into pieces with their offsets."""
    for offset in range(0, len(data), size):
        yield offset, data[offset : offset + size]
