"""Fetching an image from an http or https URL, as far as the policy allows.

The host's name is looked up once, all its addresses are checked, and the connection goes to a checked address: a name
whose addresses change meanwhile gains nothing. Every redirection is checked like the first URL. No proxy is used, for
a proxy would look the name up again.
"""

import ssl
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import httpcore
import httpx

from segrpc.service.errors import ImageFetchError, InvalidFieldError, UriNotAllowedError
from segrpc.service.images.decode import ImageLimits, check_size
from segrpc.service.images.look_ups import LookUps
from segrpc.service.images.policy import DEFAULT_PORTS, SourcePolicy, is_public

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_FAILURES: Final = (httpcore.NetworkError, httpcore.ProtocolError, OSError)


def fetch(url: str, policy: SourcePolicy, limits: ImageLimits, look_ups: LookUps | None = None) -> bytes:
    """Fetch a file. Blocks for up to ``policy.timeout`` seconds.

    Args:
        url: An absolute http or https URL.
        policy: Which hosts may be asked.
        limits: How large the file may be.
        look_ups: Looks hosts up; to be shared by all who fetch. Default: one of its own.

    Raises:
        InvalidFieldError: If the URL is malformed.
        UriNotAllowedError: If the policy forbids it, or where it redirects to.
        ImageFetchError: If the host cannot be reached, is too slow, or does not answer with a file.
        ImageTooLargeError: If the file has too many bytes.
        OverloadedError: If too many look-ups hang.
    """
    look_ups = look_ups or LookUps()
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidFieldError.of("uri", f"is no valid URL: {error}") from error
    deadline = _Deadline(policy.timeout)
    for _ in range(policy.max_redirects + 1):
        host, port = _check_url(target, policy)
        try:
            addresses = look_ups.addresses(host, port, deadline.remaining())
            _check_addresses(host, addresses, policy)
            answer = _get(target, _CheckedBackend(addresses, deadline), limits)
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise ImageFetchError(f"{host} did not send the image within {policy.timeout:g} s") from error
        except (*_FAILURES, UnicodeError) as error:  # UnicodeError: the name cannot be looked up
            raise ImageFetchError(f"cannot fetch the image from {host}: {error}") from error
        if isinstance(answer, bytes):
            return answer
        target = _redirected(target, answer)
    raise ImageFetchError(f"the image is behind more than {policy.max_redirects} redirections")


def _check_url(url: httpx.URL, policy: SourcePolicy) -> tuple[str, int]:
    """Check a URL against the policy; return its host and port."""
    host = url.raw_host.decode("ascii")
    if url.scheme not in DEFAULT_PORTS:
        raise UriNotAllowedError("the URL redirects to a scheme other than http and https")
    if not host:
        raise InvalidFieldError.of("uri", "names no host")
    if url.userinfo:
        raise UriNotAllowedError(f"the URL of {host} has a user name or password; such URLs are not fetched")
    port = DEFAULT_PORTS[url.scheme] if url.port is None else url.port
    if not policy.allows(url.scheme, host, port):
        raise UriNotAllowedError(
            f"{host}, port {port}, may not be asked: the server fetches images only from hosts that its operator names "
            f"with --allowed-host (HOST, or HOST:PORT for a port other than {DEFAULT_PORTS[url.scheme]})"
        )
    return host, port


def _check_addresses(host: str, addresses: Sequence[str], policy: SourcePolicy) -> None:
    if not addresses:
        raise ImageFetchError(f"the host {host} has no address")
    if not policy.allow_private_addresses and not all(map(is_public, addresses)):
        raise UriNotAllowedError(
            f"{host} has an address that is not public; the operator can allow that with --allow-private-addresses"
        )


def _redirected(url: httpx.URL, location: str) -> httpx.URL:
    try:
        target = url.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise ImageFetchError(f"{url.host} redirects to an invalid URL") from error
    if url.scheme == "https" and target.scheme == "http":
        raise UriNotAllowedError(f"{url.host} redirects from https to http")
    return target


def _get(url: httpx.URL, backend: httpcore.NetworkBackend, limits: ImageLimits) -> bytes | str:
    """Send one request; return the body, or where it redirects to."""
    headers = [
        (b"Host", url.netloc),
        (b"User-Agent", b"segrpc"),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),  # nothing is decompressed here, so nothing can swell
    ]
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    context = ssl.create_default_context() if url.scheme == "https" else None
    with (
        httpcore.ConnectionPool(ssl_context=context, network_backend=backend) as pool,
        pool.stream("GET", target, headers=headers) as response,
    ):
        fields = {name.lower(): value.decode("latin-1") for name, value in reversed(response.headers)}
        if response.status in _REDIRECTS and b"location" in fields:
            return fields[b"location"]
        if response.status != 200:
            raise ImageFetchError(f"{url.host} answered with status {response.status}")
        if fields.get(b"content-encoding", "identity").lower() != "identity":
            raise ImageFetchError(f"{url.host} sent the image compressed, although it was asked not to")
        check_size(int(fields.get(b"content-length", 0)), limits)
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            check_size(len(body), limits)
        return bytes(body)


class _Deadline:
    """A time by which everything must be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return how many seconds are left, more than 0.

        Raises:
            TimeoutError: If none are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to the given addresses, whatever the host's name; the name is still what certificates must show.

    Args:
        addresses: They are tried in this order.
        deadline: No operation takes longer than this. Limits for each read alone would let a slow sender go on forever.
    """

    def __init__(self, addresses: Sequence[str], deadline: _Deadline) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers."""
        for left in range(len(self._addresses), 0, -1):
            share = self._deadline.remaining() / left  # so that one dead address does not take all the time
            try:
                stream = self._backend.connect_tcp(self._addresses[-left], port, share, local_address, socket_options)
                return _LimitedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if left == 1:
                    raise
        raise httpcore.ConnectError("no address")


class _LimitedStream(httpcore.NetworkStream):
    """A connection that ends at a deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.remaining())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.remaining())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.remaining())
        return _LimitedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
