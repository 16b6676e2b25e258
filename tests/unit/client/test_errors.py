"""How the statuses of calls become errors, those included that gRPC makes up by itself."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata

from segrpc.client.errors import ServerError, UnavailableError, error_from


def failed(code: grpc.StatusCode, message: str, reason: str = "") -> AioRpcError:
    trailers = Metadata()
    if reason:
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="segrpc.v1"))
        status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
        trailers.add("grpc-status-details-bin", status.SerializeToString())
    return AioRpcError(code, Metadata(), trailers, details=message)


def test_a_bug_of_the_server_is_told_as_one() -> None:
    error = error_from(failed(grpc.StatusCode.INTERNAL, "a bug", "INTERNAL"))
    assert type(error) is ServerError
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.INTERNAL, "Internal error from Core"),  # a connection that broke while it was sending
        (grpc.StatusCode.CANCELLED, "CANCELLED"),  # a server with more calls than gRPC keeps for it
    ],
)
def test_what_grpc_says_by_itself_is_no_bug_of_the_server(code: grpc.StatusCode, message: str) -> None:
    error = error_from(failed(code, message))
    assert type(error) is UnavailableError
    assert error.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS])
def test_what_nobody_expects_keeps_its_code(code: grpc.StatusCode) -> None:
    error = error_from(failed(code, "what?"))
    assert type(error) is ServerError
    assert error.code is code
