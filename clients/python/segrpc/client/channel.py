"""How channels are opened, and what every call carries: what both clients share."""

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import grpc

from segrpc.client.errors import UnauthenticatedError

Token: TypeAlias = str | Callable[[], str]
AsyncToken: TypeAlias = Token | Callable[[], Awaitable[str]]
Metadata: TypeAlias = tuple[tuple[str, str], ...]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 60.0  # seconds; a first call on a CPU encodes the image
RECONNECT_SECONDS = 60.0  # half of what the server keeps a session for, by default
MAX_MESSAGE_BYTES = 64 * 2**20  # an embedding in float32 has 17 MB

# Calls that may be repeated: nothing depends on how often they ran. Streams never are.
_SAFE = [
    {"service": "segrpc.v1.SegmentationService", "method": "Segment"},
    {"service": "segrpc.v1.SegmentationService", "method": "EncodeImage"},
    {"service": "segrpc.v1.ModelService"},
]
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def channel_options(extra: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the options of a channel; ``extra`` ones win."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),  # less than 10 s would be refused as too many pings
        ("grpc.http2.ping_timeout_ms", 20_000),  # gRPC 1.85 would wait a minute for the answer
        # Tried again soon: gRPC would wait up to two minutes, longer than a person or a session does.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A connection of its own: the server keeps callers apart by connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", json.dumps({"methodConfig": [{"name": _SAFE, "retryPolicy": _RETRY}]})),
        *extra,
    ]


class ConnectionOptions(TypedDict, total=False):
    """How to reach a server, and as whom.

    Attributes:
        traceparent: Returns the W3C ``traceparent`` of the next call or stream, or nothing. Default: that of the span
            which is active, if the program uses OpenTelemetry.
        token: The API key or JSON Web Token that says who calls; or a function that returns it, asked before each call
            and each stream, and so also when a session connects again (for asyncio it may be a coroutine function).
            Refused without TLS, unless the server is on this machine.
        tls: Whether to connect with TLS; implied by the next three. Default: False.
        ca: File with the authorities to trust, in PEM. Default: those of the system that gRPC knows.
        client_certificate: File with this client's certificate, in PEM, for a server that asks for one.
        client_key: File with its private key, in PEM.
        credentials: gRPC channel credentials of one's own, instead of the four before.
        options: Further gRPC channel options.
    """

    token: AsyncToken | None
    traceparent: Callable[[], str]
    tls: bool
    ca: str | PathLike[str] | None
    client_certificate: str | PathLike[str] | None
    client_key: str | PathLike[str] | None
    credentials: grpc.ChannelCredentials | None
    options: Sequence[tuple[str, Any]]


def open_channel(target: str, given: ConnectionOptions, grpc_module: Any) -> Any:
    """Open a channel.

    Args:
        target: The server, as gRPC names it.
        given: How to reach it.
        grpc_module: ``grpc`` or ``grpc.aio``.

    Raises:
        ValueError: If options do not go together, or a token would travel in the clear.
        OSError: If a file cannot be read.
        TypeError: If an option is unknown.
    """
    unknown = given.keys() - ConnectionOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    options = channel_options(given.get("options", ()))
    credentials = _credentials(given)
    if credentials is not None:
        return grpc_module.secure_channel(target, credentials, options=options)
    if given.get("token"):
        if not is_local(target):
            raise ValueError(f"a token would travel to {target} in the clear: use TLS, or a server on this machine")
        options.append(("grpc.enable_http_proxy", 0))  # which would carry it elsewhere
    return grpc_module.insecure_channel(target, options=options)


def _credentials(given: ConnectionOptions) -> grpc.ChannelCredentials | None:
    own = given.get("credentials")
    ca, certificate, key = (given.get("ca"), given.get("client_certificate"), given.get("client_key"))
    if (certificate is None) != (key is None):
        raise ValueError("client_certificate and client_key need each other")
    if not (given.get("tls") or ca or certificate):
        return own
    if own is not None:
        raise ValueError("give either credentials, or tls, ca, client_certificate and client_key")
    read = [None if file is None else Path(file).read_bytes() for file in (ca, key, certificate)]
    made: grpc.ChannelCredentials = grpc.ssl_channel_credentials(*read)
    return made


def is_local(target: str) -> bool:
    """Tell whether a target is on this machine whatever the network says: a loopback address or a Unix socket."""
    scheme, found, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    if found and scheme in ("dns", "ipv4", "ipv6"):
        if rest.startswith("//") and not rest.startswith("///"):  # a name server of somebody's says where it is
            return False
        target = rest.rpartition("/")[2]
    if "," in target:  # several addresses
        return False
    host = target if target.count(":") > 1 and "]" not in target else target.rpartition(":")[0] or target
    host = host.strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class CallMetadata:
    """What every call carries to say who calls, and in which trace.

    Args:
        given: How to reach the server.
    """

    def __init__(self, given: ConnectionOptions) -> None:
        self._token = given.get("token")
        self._traceparent = given.get("traceparent", active_traceparent)

    def of_call(self) -> Metadata:
        """Return the metadata of the next call.

        Raises:
            UnauthenticatedError: If there is no token to be had.
        """
        if self._token is None:
            return self._trace()
        try:
            own = _authorization(self._token() if callable(self._token) else self._token)
        except Exception as error:
            raise _no_token(error) from error
        return own + self._trace()

    async def of_call_async(self) -> Metadata:
        """Do as `of_call`, and wait for a token that must be waited for."""
        if self._token is None:
            return self._trace()
        try:
            token = self._token() if callable(self._token) else self._token
            own = _authorization(await token if isinstance(token, Awaitable) else token)
        except Exception as error:
            raise _no_token(error) from error
        return own + self._trace()

    def _trace(self) -> Metadata:
        value = self._traceparent()
        return (("traceparent", value),) if value else ()


def active_traceparent() -> str:
    """Return the ``traceparent`` of OpenTelemetry's active span; empty if there is none.

    A program that has one has imported OpenTelemetry, so that the client need not.
    """
    trace = sys.modules.get("opentelemetry.trace")
    span = trace.get_current_span().get_span_context() if trace is not None else None
    if span is None or not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


def _authorization(token: object) -> Metadata:
    # What gRPC says of a bad one quotes it.
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token is a str of printable ASCII characters without spaces")
    return (("authorization", f"Bearer {token}"),)


def _no_token(error: Exception) -> UnauthenticatedError:
    return UnauthenticatedError(f"there is no token to call with: {error}", grpc.StatusCode.UNAUTHENTICATED)
