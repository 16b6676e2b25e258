"""Fetching from real web servers on the loopback interface."""

import gzip
import http.server
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from segrpc.service.errors import (
    ImageFetchError,
    ImageTooLargeError,
    InvalidFieldError,
    OverloadedError,
    UriNotAllowedError,
)
from segrpc.service.images.decode import ImageLimits
from segrpc.service.images.fetch import fetch
from segrpc.service.images.look_ups import LookUps, resolve_host
from segrpc.service.images.policy import SourcePolicy

BODY = bytes(range(256)) * 300
LIMITS = ImageLimits()


class Web(http.server.ThreadingHTTPServer):
    """A web server that remembers what it was asked, and can be held."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.proceed = threading.Event()  # what holds an answer back

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def policy(self, *hosts: str, timeout: float = 30.0, private: bool = True, max_redirects: int = 3) -> SourcePolicy:
        """A policy that allows this server."""
        return SourcePolicy(
            allowed_hosts=(self.host, *hosts),
            allow_private_addresses=private,
            timeout=timeout,
            max_redirects=max_redirects,
        )

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients leave early on purpose."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web
    REDIRECTS: ClassVar = {
        "/moved": (301, "/image"),
        "/found": (302, "image?x=1"),
        "/other": (303, "/image"),
        "/temporary": (307, "/image"),
        "/permanent": (308, "/image"),
        "/circle": (302, "/circle"),
        "/3": (302, "/2"),
        "/2": (302, "/1"),
        "/1": (302, "/image"),
        "/metadata": (302, "http://169.254.169.254/latest/meta-data"),
        "/elsewhere": (302, "http://elsewhere.example/image"),
        "/port": (302, "http://127.0.0.1:9/image"),
        "/password": (302, "http://user:secret@127.0.0.1/image"),
        "/file": (302, "file:///etc/passwd"),
        "/ftp": (302, "ftp://127.0.0.1/image"),
        "/invalid": (302, "http://[::1/image"),
    }

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        path = self.path.partition("?")[0]
        if path in self.REDIRECTS:
            status, location = self.REDIRECTS[path]
            self.answer(status, b"moved", ("Location", location))
        elif path.startswith("/status/"):
            self.answer(int(path.rpartition("/")[2]), b"")
        else:
            getattr(self, path.removeprefix("/"))()

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        if status >= 200 and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def image(self) -> None:
        self.answer(200, BODY)

    def empty(self) -> None:
        self.answer(200, b"")

    def chunked(self) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(BODY), 10_000):
            part = BODY[start : start + 10_000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def until_closed(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BODY)

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:  # until the client hangs up
            self.wfile.write(BODY)

    def announces_too_much(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(2**40))
        self.end_headers()
        self.server.proceed.wait()

    def cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) + 1))
        self.end_headers()
        self.wfile.write(BODY)

    def compressed(self) -> None:
        self.answer(200, gzip.compress(BODY), ("Content-Encoding", "gzip"))

    def says_identity(self) -> None:
        self.answer(200, BODY, ("Content-Encoding", "Identity"))

    def nowhere(self) -> None:
        self.answer(302, b"moved")

    def silent(self) -> None:
        self.server.proceed.wait()

    def stalls(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:100])
        self.server.proceed.wait()

    def drips(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(2**20))
        self.end_headers()
        self.drip(b"x")

    def drips_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"X: y\r\n")

    def drip(self, drop: bytes) -> None:
        while not self.server.proceed.wait(0.01):  # until the client hangs up, or the end of the test
            self.wfile.write(drop)

    def hangs_up(self) -> None:
        self.close_connection = True

    def garbage(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def bad_length(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "many")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.proceed.set()
        running.shutdown()
        thread.join()


def to(*addresses: str) -> LookUps:
    """Look-ups that always give the same addresses."""
    return LookUps(resolve=lambda host, port: addresses)


def never(host: str, port: int) -> Sequence[str]:
    """A look-up that must not happen."""
    raise AssertionError(f"{host} was looked up")


NO_LOOK_UPS = LookUps(resolve=never)


@pytest.mark.parametrize("path", ["/image", "/chunked", "/until_closed", "/says_identity", "/image?a=%20b&c#fragment"])
def test_a_file_of_an_allowed_host(web: Web, path: str) -> None:
    assert fetch(web.url(path), web.policy(), LIMITS) == BODY
    assert web.paths == [path.partition("#")[0]]


def test_an_empty_file(web: Web) -> None:
    assert fetch(web.url("/empty"), web.policy(), LIMITS) == b""


def test_the_request_tells_nothing_and_asks_for_no_compression(web: Web) -> None:
    fetch(web.url("/image"), web.policy(), LIMITS)
    ((_, headers),) = web.asked
    assert headers == {
        "host": web.host,
        "user-agent": "segrpc",
        "accept": "image/*",
        "accept-encoding": "identity",
    }


def test_no_proxy_is_asked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(web.url("/image"), web.policy(), LIMITS) == BODY


@pytest.mark.parametrize("path", ["/moved", "/found", "/other", "/temporary", "/permanent"])
def test_a_redirect_within_the_policy_is_followed(web: Web, path: str) -> None:
    assert fetch(web.url(path), web.policy(), LIMITS) == BODY
    assert web.paths == [path, "/image?x=1" if path == "/found" else "/image"]


def test_redirects_are_counted(web: Web) -> None:
    assert fetch(web.url("/3"), web.policy(), LIMITS) == BODY
    with pytest.raises(ImageFetchError, match="more than 2 redirections"):
        fetch(web.url("/3"), web.policy(max_redirects=2), LIMITS)
    with pytest.raises(ImageFetchError, match="more than 0 redirections"):
        fetch(web.url("/1"), web.policy(max_redirects=0), LIMITS)
    web.asked.clear()
    with pytest.raises(ImageFetchError, match="more than 3 redirections"):
        fetch(web.url("/circle"), web.policy(), LIMITS)
    assert web.paths == ["/circle"] * 4


@pytest.mark.parametrize("path", ["/metadata", "/elsewhere", "/port", "/password", "/file", "/ftp"])
def test_a_redirect_out_of_the_policy_is_not(web: Web, path: str) -> None:
    with pytest.raises(UriNotAllowedError) as caught:
        fetch(web.url(path), web.policy(), LIMITS)
    assert "secret" not in caught.value.message
    assert web.paths == [path]


def test_a_redirect_to_another_allowed_host_is_looked_up_in_turn(web: Web) -> None:
    looked_up: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        looked_up.append((host, port))
        return ["127.0.0.1"] if host == "127.0.0.1" else []

    with pytest.raises(ImageFetchError, match=r"the host elsewhere\.example has no address"):
        fetch(web.url("/elsewhere"), web.policy("elsewhere.example"), LIMITS, LookUps(resolve=resolve))
    assert looked_up == [("127.0.0.1", web.server_port), ("elsewhere.example", 80)]


def test_a_redirect_to_no_url(web: Web) -> None:
    with pytest.raises(ImageFetchError, match="redirects to an invalid URL"):
        fetch(web.url("/invalid"), web.policy(), LIMITS)
    with pytest.raises(ImageFetchError, match="answered with status 302"):
        fetch(web.url("/nowhere"), web.policy(), LIMITS)


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 403, 404, 500, 503])
def test_only_status_200_gives_an_image(web: Web, status: int) -> None:
    with pytest.raises(ImageFetchError, match=f"answered with status {status}"):
        fetch(web.url(f"/status/{status}"), web.policy(), LIMITS)


@pytest.mark.parametrize("path", ["/cut", "/hangs_up", "/garbage", "/bad_length", "/compressed"])
def test_a_broken_answer(web: Web, path: str) -> None:
    with pytest.raises(ImageFetchError, match=r"127\.0\.0\.1"):
        fetch(web.url(path), web.policy(), LIMITS)


def test_tls_is_not_spoken_by_everybody(web: Web) -> None:
    with pytest.raises(ImageFetchError, match=r"cannot fetch the image from 127\.0\.0\.1"):
        fetch(f"https://{web.host}/image", web.policy(), LIMITS)
    assert web.asked == []


def test_nobody_answers() -> None:
    with socket.socket() as bound:  # but not listening
        bound.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{bound.getsockname()[1]}"
        policy = SourcePolicy(allowed_hosts=(host,), allow_private_addresses=True)
        with pytest.raises(ImageFetchError, match=r"cannot fetch the image from 127\.0\.0\.1"):
            fetch(f"http://{host}/image", policy, LIMITS)


@pytest.mark.parametrize("path", ["/image", "/chunked", "/until_closed"])
def test_a_file_may_have_as_many_bytes_as_allowed_and_no_more(web: Web, path: str) -> None:
    assert fetch(web.url(path), web.policy(), ImageLimits(max_bytes=len(BODY))) == BODY
    with pytest.raises(ImageTooLargeError):
        fetch(web.url(path), web.policy(), ImageLimits(max_bytes=len(BODY) - 1))


def test_a_file_that_announces_too_much_is_not_waited_for(web: Web) -> None:
    with pytest.raises(ImageTooLargeError, match=f"{2**40} bytes"):
        fetch(web.url("/announces_too_much"), web.policy(), LIMITS)


def test_a_file_without_end_is_given_up(web: Web) -> None:
    with pytest.raises(ImageTooLargeError):
        fetch(web.url("/endless"), web.policy(), ImageLimits(max_bytes=10**6))


@pytest.mark.parametrize("path", ["/silent", "/stalls"])
def test_a_server_that_hangs_is_given_up(web: Web, path: str) -> None:
    # It hangs until the end of the test: only the time limit can end this.
    with pytest.raises(ImageFetchError, match=r"127\.0\.0\.1 did not send the image within 0\.3 s"):
        fetch(web.url(path), web.policy(timeout=0.3), LIMITS)
    assert web.paths == [path]


def test_a_look_up_that_hangs_is_given_up(web: Web) -> None:
    def resolve(host: str, port: int) -> Sequence[str]:
        web.proceed.wait()
        return ["127.0.0.1"]

    with pytest.raises(ImageFetchError, match=r"did not send the image within 0\.3 s"):
        fetch(web.url("/image"), web.policy(timeout=0.3), LIMITS, LookUps(resolve=resolve))
    assert web.asked == []


def test_look_ups_that_hang_are_bounded(web: Web) -> None:
    """Each goes on in a thread, which nothing can stop, when nobody waits for it any more."""
    hanging: list[str] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        hanging.append(host)
        web.proceed.wait()
        return ["127.0.0.1"]

    look_ups = LookUps(most=3, resolve=resolve)
    for _ in range(3):
        with pytest.raises(ImageFetchError):
            fetch(web.url("/image"), web.policy(timeout=0.05), LIMITS, look_ups)
    for _ in range(20):
        with pytest.raises(OverloadedError, match="too many look-ups"):
            fetch(web.url("/image"), web.policy(), LIMITS, look_ups)
    assert len(hanging) == 3
    threads = [thread for thread in threading.enumerate() if thread.name == "segrpc-look-up"]
    web.proceed.set()
    for thread in threads:
        thread.join()
    assert fetch(web.url("/image"), web.policy(), LIMITS, look_ups) == BODY


@pytest.mark.parametrize("path", ["/drips", "/drips_headers"])
def test_a_server_that_drips_is_given_up(web: Web, path: str) -> None:
    # Each read is answered within the time limit; only all of them together take too long.
    with pytest.raises(ImageFetchError, match=r"127\.0\.0\.1 did not send the image within 0\.5 s"):
        fetch(web.url(path), web.policy(timeout=0.5), LIMITS)


def test_a_server_that_hangs_holds_up_nobody_else(web: Web) -> None:
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(fetch, web.url("/stalls"), web.policy(), LIMITS)
        assert fetch(web.url("/image"), web.policy(), LIMITS) == BODY
        assert not hanging.done()
        web.proceed.set()
        with pytest.raises(ImageFetchError):
            hanging.result()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.1.2.3", "169.254.169.254", "::ffff:127.0.0.1"])
def test_private_addresses_are_refused_by_default(web: Web, address: str) -> None:
    policy = web.policy("images.example", private=False)
    for addresses in ([address], ["8.8.8.8", address]):
        with pytest.raises(UriNotAllowedError, match="--allow-private-addresses"):
            fetch("http://images.example/image", policy, LIMITS, to(*addresses))
    with pytest.raises(UriNotAllowedError, match="--allow-private-addresses"):
        fetch(web.url("/image"), policy, LIMITS)
    assert web.asked == []


@pytest.mark.parametrize(
    "host",
    ["2130706433", "127.1", "127.0.1", "0x7f.0.0.1", "0x7f000001", "017700000001", "0", "0.0.0.0", "[::ffff:7f00:1]"],
)
def test_other_ways_to_write_a_private_address_gain_nothing(web: Web, host: str) -> None:
    """Even if the operator allows one as a host: the system makes an address of it, and that is looked at."""
    allowed = f"{host}:{web.server_port}"
    with pytest.raises(UriNotAllowedError, match="--allow-private-addresses"):
        fetch(f"http://{allowed}/image", web.policy(allowed, private=False), LIMITS)
    assert web.asked == []


def test_a_name_that_changes_is_looked_up_and_checked_for_each_redirect(web: Web) -> None:
    """The first answer of the name service is harmless, the next one is not."""
    answers = iter([["127.0.0.1"], ["127.0.0.1"], []])
    host = f"images.example:{web.server_port}"
    with pytest.raises(ImageFetchError, match=r"the host images\.example has no address"):
        fetch(f"http://{host}/3", web.policy(host), LIMITS, LookUps(resolve=lambda name, port: next(answers)))
    assert web.paths == ["/3", "/2"]


def test_a_name_is_looked_up_once_and_the_checked_address_asked(web: Web) -> None:
    looked_up: list[tuple[str, int]] = []
    host = f"images.example:{web.server_port}"

    def resolve(name: str, port: int) -> Sequence[str]:
        looked_up.append((name, port))
        return ["127.0.0.1"]

    assert fetch(f"http://{host}/image", web.policy(host), LIMITS, LookUps(resolve=resolve)) == BODY
    assert looked_up == [("images.example", web.server_port)]
    assert web.asked[0][1]["host"] == host


def test_the_next_address_is_tried_when_one_is_dead(web: Web) -> None:
    # The server listens on the second address alone.
    assert fetch(web.url("/image"), web.policy(), LIMITS, to("127.0.0.2", "127.0.0.1")) == BODY
    with pytest.raises(ImageFetchError):
        fetch(web.url("/image"), web.policy(), LIMITS, to("127.0.0.2", "127.0.0.3"))


def test_a_name_without_address(web: Web) -> None:
    def fail(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(ImageFetchError, match=r"the host 127\.0\.0\.1 has no address"):
        fetch(web.url("/image"), web.policy(), LIMITS, to())
    with pytest.raises(ImageFetchError, match="Name or service not known"):
        fetch(web.url("/image"), web.policy(), LIMITS, LookUps(resolve=fail))


def test_a_name_that_cannot_be_looked_up(web: Web) -> None:
    label = "a" * 64  # one letter too long
    with pytest.raises(ImageFetchError):
        fetch(f"http://{label}.example/image", web.policy(f"{label}.example"), LIMITS)


def test_an_international_name_is_checked_in_its_ascii_form(web: Web) -> None:
    host = f"xn--bcher-kva.example:{web.server_port}"
    url = f"http://b\u00fccher.example:{web.server_port}/image"
    assert fetch(url, web.policy(host), LIMITS, to("127.0.0.1")) == BODY
    assert web.asked[0][1]["host"] == host


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/image",
        "http://127.0.0.2:PORT/image",
        "https://127.0.0.1/image",
        "http://localhost:PORT/image",
        "http://127.0.0.1:PORT@elsewhere.example/image",
        "http://user@127.0.0.1:PORT/image",
        "http://user:password@127.0.0.1:PORT/image",
        "http://2130706433:PORT/image",
        "http://127.1:PORT/image",
        "http://0x7f.0.0.1:PORT/image",
        "http://0x7f000001:PORT/image",
        "http://0177.0.0.1:PORT/image",
        "http://017700000001:PORT/image",
        "http://127.0.0.1%00:PORT/image",
        "http://%31%32%37.0.0.1:PORT/image",
        "http://\uff11\uff12\uff17.0.0.1:PORT/image",
        "http://[::ffff:127.0.0.1]:PORT/image",
        "http://[::ffff:7f00:1]:PORT/image",
        "http://[64:ff9b::7f00:1]:PORT/image",
        "http://[2002:7f00:1::]:PORT/image",
        "http://[::1%25lo]:PORT/image",
        "http://127.0.0.1:99999/image",
        "http://elsewhere.example\\@127.0.0.1:PORT/image",
    ],
)
def test_other_hosts_are_not_even_looked_up(web: Web, url: str) -> None:
    with pytest.raises((UriNotAllowedError, InvalidFieldError)) as caught:
        fetch(url.replace("PORT", str(web.server_port)), web.policy(), LIMITS, NO_LOOK_UPS)
    assert "password@" not in caught.value.message
    assert web.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///image",
        "http:image",
        "http://[::1/image",
        "http://a:b/",
    ],
)
def test_malformed_urls(web: Web, url: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        fetch(url, web.policy("a"), LIMITS, NO_LOOK_UPS)
    assert caught.value.violations[0].field == "uri"


def test_addresses_are_looked_up_by_the_system() -> None:
    assert resolve_host("127.0.0.1", 80) == ["127.0.0.1"]
    assert set(resolve_host("localhost", 80)) <= {"127.0.0.1", "::1"}
