"""HTTP/2, frame by frame: what no client library would send."""

import struct
from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS = 4
MAX_FRAME = 16384

SEGMENT = b"/segrpc.v1.SegmentationService/Segment"
UPLOAD = b"/segrpc.v1.SegmentationService/UploadImage"
HEALTH = b"/grpc.health.v1.Health/Check"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame; its length may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes, *, keep: bool = False) -> bytes:
    """A header field in plain HPACK, without Huffman codes; ``keep`` puts it into the dynamic table."""
    return b"".join((b"\x40" if keep else b"\0", integer(len(name)), name, integer(len(value)), value))


def integer(value: int) -> bytes:
    """A number of HPACK with a prefix of 7 bits."""
    if value < 127:
        return bytes([value])
    found, value = bytearray([127]), value - 127
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found) + bytes([value])


def request(path: bytes, *more: bytes) -> bytes:
    """The header block of a gRPC call."""
    return b"".join(
        (
            b"\x83\x86",  # :method POST, :scheme http
            literal(b":path", path),
            literal(b":authority", b"localhost"),
            literal(b"content-type", b"application/grpc"),
            literal(b"te", b"trailers"),
            *more,
        )
    )


def call(stream: int, path: bytes = SEGMENT, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, request(path))


def message(announced: int, content: bytes, compressed: int = 0) -> bytes:
    """A gRPC message; its length may be a lie."""
    return struct.pack(">BI", compressed, announced) + content


def many(count: int, make: Callable[[int], bytes]) -> bytes:
    return b"".join(make(2 * i + 1) for i in range(count))


START = PREFACE + frame(SETTINGS, 0, 0)
# A call of a method whose name is no UTF-8, at which grpc.aio stops serving.
NAMELESS = START + call(1, b"/\xff") + frame(DATA, END_STREAM, 1, message(0, b""))
