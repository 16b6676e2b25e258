"""Broken and hostile HTTP/2, frame by frame: whatever a connection does, the others are served, and nothing stays."""

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from segrpc.v1.refine_pb2 import ImageChunk, UploadHeader
from segrpc.v1.segmentation_service_pb2 import SegmentRequest, UploadImageRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.flood import Flood
from tests.blackbox.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    HEALTH,
    MAX_FRAME,
    NAMELESS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SEGMENT,
    SETTINGS,
    START,
    UPLOAD,
    WINDOW_UPDATE,
    call,
    frame,
    integer,
    literal,
    many,
    message,
    request,
)
from tests.server_process import ServerProcess, connect, raw

# Far more than what allocators keep, far less than what was sent or announced.
MARGIN = 48 * 2**20


NOISE = random.Random(20_240_607).randbytes(4000)

# After these the rest of the connection has no meaning, and the server must end it.
FATAL = {
    "noise instead of the preface": NOISE,
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + NOISE[:160],
    "a preface that goes wrong at its end": PREFACE[:-1] + b"x",
    "noise after the preface": START + NOISE,
    "a frame longer than allowed": START + frame(DATA, 0, 1, NOISE, length=2**24 - 1),
    "settings longer than allowed": PREFACE + frame(SETTINGS, 0, 0, NOISE, length=2**24 - 1),
    "settings of five bytes": START + frame(SETTINGS, 0, 0, b"12345"),
    "settings acknowledged with content": START + frame(SETTINGS, ACK, 0, bytes(6)),
    "settings of a stream": START + frame(SETTINGS, 0, 1),
    "a ping of seven bytes": START + frame(PING, 0, 0, b"1234567"),
    "a window update of three bytes": START + frame(WINDOW_UPDATE, 0, 0, b"123"),
    "continuation of nothing": START + frame(CONTINUATION, END_HEADERS, 1, request(HEALTH)),
    "data amid headers": START + call(1, flags=0) + frame(DATA, 0, 1, b"x") + frame(CONTINUATION, END_HEADERS, 1),
    "continuation of another stream": START + call(1, flags=0) + frame(CONTINUATION, END_HEADERS, 3),
    "an index that no table has": START + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\x7f"),
    "an index that never ends": START + frame(HEADERS, END_HEADERS, 1, b"\xff" * 2000),
}
# These concern one stream or nobody; the connection may go on.
HARMLESS = {
    "nothing at all": b"",
    "half a preface": PREFACE[:9],
    "half a frame": START + call(1)[:7],
    "a header block that ends within a field": START + frame(HEADERS, END_HEADERS, 1, request(HEALTH)[:-3]),
    "a field that is said to be longer": START + frame(HEADERS, END_HEADERS, 1, b"\0" + integer(2**31) + b"name"),
    "broken Huffman codes": START + frame(HEADERS, END_HEADERS, 1, b"\x83\x86\0\x84\xff\xff\xff\xff\x81\0"),
    "a dynamic table of 4 GiB": START
    + frame(HEADERS, END_HEADERS, 1, b"\x3f" + b"\xe1\xff\xff\xff\x0f" + request(HEALTH)),
    "no path": START + frame(HEADERS, END_HEADERS, 1, b"\x83\x86"),
    "a window beyond 2^31": START + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
    "headers of stream 0": START + call(0),
    "two paths": START + frame(HEADERS, END_HEADERS, 1, request(HEALTH, literal(b":path", SEGMENT))),
    "a method nobody has": START + call(1, b"/a/b") + frame(DATA, END_STREAM, 1, message(0, b"")),
    "headers that are no text": START
    + frame(HEADERS, END_HEADERS, 1, request(SEGMENT, literal(b"authorization", b"\xff\0\n"), literal(b"Upper", b"x")))
    + frame(DATA, END_STREAM, 1, message(0, b"")),
    "no time to answer": START
    + frame(HEADERS, END_HEADERS, 1, request(SEGMENT, literal(b"grpc-timeout", b"-1S")))
    + frame(DATA, END_STREAM, 1, message(0, b"")),
    "a stream with an even number": START + call(2) + frame(DATA, END_STREAM, 2, message(0, b"")),
    "streams that count down": START + call(5) + call(3) + call(1),
    "the same stream again": START + call(1) * 3,
    "data of a stream that never was": START + frame(DATA, 0, 77, NOISE),
    "data of stream 0": START + frame(DATA, 0, 0, NOISE),
    "data after the end": START + call(1) + frame(DATA, END_STREAM, 1, message(0, b"")) + frame(DATA, 0, 1, NOISE),
    "reset of a stream that never was": START + frame(RST_STREAM, 0, 77, bytes(4)),
    "a window update of nothing": START + call(1) + frame(WINDOW_UPDATE, 0, 1, bytes(4)),
    "a push": START + frame(PUSH_PROMISE, END_HEADERS, 1, struct.pack(">I", 2) + request(HEALTH)),
    "a priority of itself": START + frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 255)),
    "frames of unknown kinds": START + b"".join(frame(kind, 255, 1, NOISE[:99]) for kind in range(11, 256)),
    "padding longer than the frame": START + call(1) + frame(DATA, 8, 1, b"\xff123"),
    "a farewell, then a call": START + frame(GOAWAY, 0, 0, bytes(8)) + call(1),
    "a message of 4 GiB": START + call(1) + frame(DATA, 0, 1, message(2**32 - 1, NOISE)),
    "a message of 4 GiB that ends": START + call(1) + frame(DATA, END_STREAM, 1, message(2**32 - 1, NOISE)),
    "a message cut off, then the end": START + call(1) + frame(DATA, END_STREAM, 1, message(5000, NOISE[:100])),
    "a prefix cut off, then the end": START + call(1) + frame(DATA, END_STREAM, 1, b"\0\0\0"),
    "an upload cut off, then the end": START + call(1, UPLOAD) + frame(DATA, END_STREAM, 1, message(9, b"\x0a")),
    "the end without a message": START + call(1, flags=END_HEADERS | END_STREAM),
    "two messages where one belongs": START + call(1) + frame(DATA, END_STREAM, 1, message(0, b"") * 2),
    "compressed, but how?": START + call(1) + frame(DATA, END_STREAM, 1, message(100, NOISE[:100], compressed=1)),
    "a flag that nobody knows": START + call(1) + frame(DATA, END_STREAM, 1, message(100, NOISE[:100], compressed=7)),
    "compressed, but not really": START
    + frame(HEADERS, END_HEADERS, 1, request(SEGMENT, literal(b"grpc-encoding", b"gzip")))
    + frame(DATA, END_STREAM, 1, message(100, NOISE[:100], compressed=1)),
}
KEPT = literal(b"x-kept", b"v" * 3900, keep=True)
FLOODS = {
    "rapid resets": many(5000, lambda s: call(s) + frame(RST_STREAM, 0, s, struct.pack(">I", 8))),
    "rapid resets amid a message": many(
        3000, lambda s: call(s) + frame(DATA, 0, s, message(2**20, NOISE[:200])) + frame(RST_STREAM, 0, s, bytes(4))
    ),
    "calls that never go on": many(5000, call),
    "pings": frame(PING, 0, 0, b"12345678") * 50_000,
    "settings": frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 20_000,
    "windows of streams": call(1) + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1)) * 20_000,
    "continuations": call(1, flags=0) + frame(CONTINUATION, 0, 1, literal(b"x", b"v" * 1000)) * 40_000,
    "empty continuations": call(1, flags=0) + frame(CONTINUATION, 0, 1) * 200_000,
    "empty data": call(1) + frame(DATA, 0, 1) * 200_000,
    "one field of the table, again and again": frame(HEADERS, 0, 1, request(SEGMENT, KEPT))
    + frame(CONTINUATION, 0, 1, b"\xbe" * MAX_FRAME) * 20,
    "announced messages": many(90, lambda s: call(s) + frame(DATA, 0, s, message(30 * 2**20, b"x"))),
    "unknown frames": frame(99, 0, 0, NOISE) * 5000,
    "priorities": many(50_000, lambda s: frame(PRIORITY, 0, s, struct.pack(">IB", 0, 9))),
}


class Served:
    """A server, with what it holds when nobody is there."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.answers()
        self._tasks: int = server.stats()["tasks"]

    def connection(self) -> socket.socket:
        host, _, port = self.server.target.rpartition(":")
        # Long enough for any answer: it is waited out only where a server does not say goodbye although it should.
        return socket.create_connection((host, int(port)), timeout=20)

    def answers(self) -> None:
        """Check that another client is served."""
        with connect(self.server) as channel:
            assert raw(channel, HEALTH.decode())(b"", timeout=20, wait_for_ready=True) == b"\x08\x01"

    def settles(self) -> None:
        """Check that the server lives, serves, and has let go of all calls."""
        self.answers()
        self.server.wait_for(lambda stats: not stats["calls"] and stats["tasks"] <= self._tasks)
        assert "bug in" not in self.server.log_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ServerProcess("--log-level", "warning", log=tmp_path_factory.mktemp("http2") / "log") as server:
        yield Served(server)


def said_until_the_end(connection: socket.socket) -> bytes:
    """Read until the server ends the connection."""
    said = bytearray()
    try:
        while data := connection.recv(2**16):
            said += data
    except ConnectionError:  # it had not read all that was sent
        pass
    return bytes(said)


@pytest.mark.parametrize("sent", FATAL.values(), ids=FATAL)
def test_a_connection_that_makes_no_sense_is_ended(served: Served, sent: bytes) -> None:
    with served.connection() as connection:
        connection.sendall(sent)
        said_until_the_end(connection)
    served.settles()


@pytest.mark.parametrize("sent", HARMLESS.values(), ids=HARMLESS)
def test_other_connections_do_not_notice(served: Served, sent: bytes) -> None:
    with served.connection() as connection:
        connection.sendall(sent)
        served.answers()
        connection.shutdown(socket.SHUT_WR)  # and then it leaves without a word
        said_until_the_end(connection)
    served.settles()


def flood(served: Served, sent: bytes) -> None:
    """Send much without reading what the server has to say, as far as it listens."""
    with served.connection() as connection:
        connection.settimeout(3)
        with suppress(ConnectionError, TimeoutError):  # it ended the connection, or waits for us to read
            connection.sendall(START + sent)
        served.answers()
        assert served.server.resident_bytes() < 2**30


@pytest.mark.parametrize("sent", FLOODS.values(), ids=FLOODS)
def test_a_flood_leaves_nothing_behind(served: Served, sent: bytes) -> None:
    for _ in range(2):  # the first rounds fill what allocators keep
        flood(served, sent)
    served.settles()
    before = served.server.resident_bytes()
    for _ in range(2):
        flood(served, sent)
    served.settles()
    grown = served.server.resident_bytes() - before
    assert grown < MARGIN, f"the server grew by {grown / 2**20:.1f} MiB"


def test_a_connection_that_keeps_resetting_streams(served: Served, photo: bytes) -> None:
    click = SegmentRequest(image=Image(data=photo), prompts=[Prompt(points=[Point(x=5, y=5)])])
    with Flood(served.server.target) as flood, connect(served.server) as before:
        for _ in range(3):
            with connect(served.server) as fresh:
                for channel in (before, fresh):
                    assert raw(channel, HEALTH.decode())(b"", timeout=60, wait_for_ready=True) == b"\x08\x01"
                    assert SegmentationServiceStub(channel).Segment(click, timeout=60).predictions
        assert flood.goes_on()
    served.settles()


@pytest.mark.parametrize("sent", [b"", PREFACE[:-1], START + call(1)[:-1]], ids=["silent", "preface", "headers"])
def test_connections_that_never_get_going(served: Served, sent: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(served.connection())
            connection.sendall(sent)
        served.answers()
    served.settles()


def test_a_method_whose_name_is_no_text(served: Served, photo: bytes) -> None:
    # grpc.aio stops serving when it cannot decode the name, whoever asks; the server then opens the port anew.
    upload = [
        UploadImageRequest(header=UploadHeader(size=len(photo))),
        UploadImageRequest(chunk=ImageChunk(data=photo)),
    ]
    with connect(served.server) as channel:
        digest = SegmentationServiceStub(channel).UploadImage(iter(upload)).image.digest
    for count in range(1, 4):
        with served.connection() as connection:
            connection.sendall(NAMELESS)
            said_until_the_end(connection)
        served.settles()
        assert served.server.log_text().count("serving anew") == count
    asked = SegmentRequest(image=Image(digest=digest), prompts=[Prompt(points=[Point(x=5, y=5)])])
    with connect(served.server) as channel:
        assert SegmentationServiceStub(channel).Segment(asked).predictions
