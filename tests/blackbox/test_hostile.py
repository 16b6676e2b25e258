"""What was made to do harm, sent to a real server: it says what is wrong, takes no memory for it, and serves on."""

import http.server
import os
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image as PILImage

from segrpc.v1.refine_pb2 import RefineConfig
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import DATA_TYPE_FLOAT32, Image, Point, Prompt, Tensor
from tests.blackbox.failure import Failure, failure_of
from tests.blackbox.refine_stream import RefineStream, points
from tests.server_process import ServerProcess, connect
from tests.unit.images.pictures import chunk, encode, frame, gif, picture, tiff, webp, with_chunks
from tests.web_server import web_server

Code = grpc.StatusCode
MiB = 2**20
CLICK = Prompt(points=[Point(x=5, y=5)])
# Ways to write 127.0.0.1 that the system makes an address of, and addresses that stand for it.
DISGUISES = (
    *("2130706433", "127.1", "0x7f000001", "017700000001", "0", "localhost"),
    *("[::1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
)


@dataclass
class Web:
    """A web server that is not for everybody."""

    host: str = ""
    asked: list[str] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    proceed: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Site:
    """A server that may read a folder and ask the web server, on public addresses only."""

    server: ServerProcess
    stub: SegmentationServiceStub
    root: Path
    web: Web

    def serves(self) -> None:
        """Check that it goes on."""
        good = SegmentRequest(image=Image(data=encode(picture(), "PNG")), prompts=[CLICK])
        assert self.stub.Segment(good, timeout=60).predictions
        assert "bug in" not in self.server.log_text()

    def failure(self, request: SegmentRequest) -> Failure:
        """Ask what must fail."""
        return failure_of(lambda: self.stub.Segment(request, timeout=60))

    def refusal(self, uri: str) -> tuple[Code, str]:
        """Ask for an image that must not be had."""
        failure = self.failure(SegmentRequest(image=Image(uri=uri), prompts=[CLICK]))
        return failure.code, failure.reason


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    known = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            known.asked.append(self.path)
            known.arrived.release()
            known.proceed.wait()

    with web_server(Handler) as host:
        known.host = host
        yield known
        known.proceed.set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, web: Web) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("hostile")
    root = folder / "media"
    root.mkdir()
    port = web.host.rpartition(":")[2]
    allowed = [option for host in DISGUISES for option in ("--allowed-host", f"{host}:{port}")]
    options = ["--media-root", str(root), *allowed, "--log-level", "warning"]
    with ServerProcess(*options, log=folder / "log") as server, connect(server) as channel:
        made = Site(server, SegmentationServiceStub(channel), root, web)
        made.serves()  # so that what is made only once is there
        yield made


# Images


def huge_png() -> bytes:
    data = encode(picture(), "PNG")
    return data[:8] + chunk(b"IHDR", struct.pack(">2L5B", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + data[33:]


TEXT = zlib.compress(bytes(200 * MiB))
BOMBS = {
    "text of PNG": (with_chunks(chunk(b"zTXt", b"note\0\0" + TEXT)), ""),
    "international text of PNG": (with_chunks(chunk(b"iTXt", b"note\0\1\0\0\0" + TEXT)), ""),
    "colour profile of PNG": (with_chunks(chunk(b"iCCP", b"name\0\0" + TEXT)), ""),
    "many texts of PNG": (with_chunks(chunk(b"tEXt", b"note\0x") * 50_000), ""),
    "huge PNG": (huge_png(), "IMAGE_TOO_LARGE"),
    "huge WebP": (webp(16_383, 16_383), "IMAGE_TOO_LARGE"),
    "WebP as large as Pillow takes": (webp(13_300, 13_300), "IMAGE_TOO_LARGE"),
    "huge GIF": (gif((65_535, 65_535), frame(0, 0, 1, 1)), "IMAGE_TOO_LARGE"),
    "GIF with a frame beyond it": (gif((1, 1), frame(0, 0, 65_535, 65_535)), "IMAGE_UNDECODABLE"),
    "huge TIFF": (tiff(b"", 10**9, 10**9), "IMAGE_TOO_LARGE"),
    "PDF with an image": (b"%PDF-1.4\n" + encode(picture(), "JPEG"), "IMAGE_UNDECODABLE"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "IMAGE_UNDECODABLE"),
    "white PNG that swells": (
        encode(PILImage.fromarray(np.full((9000, 9000), 255, np.uint8)), "PNG"),
        "IMAGE_TOO_LARGE",
    ),
}


@pytest.mark.parametrize(("data", "reason"), BOMBS.values(), ids=BOMBS)
def test_an_image_that_swells(site: Site, data: bytes, reason: str) -> None:
    peaks = site.server.peak_bytes(), site.server.worker_peak_bytes()
    request = SegmentRequest(image=Image(data=data), prompts=[CLICK])
    if reason:
        failure = site.failure(request)
        assert (failure.code, failure.reason, failure.fields) == (Code.INVALID_ARGUMENT, reason, ("image.data",))
    else:
        assert site.stub.Segment(request, timeout=60).image.width == picture().shape[1]
    site.serves()
    assert site.server.peak_bytes() < peaks[0] + 64 * MiB
    assert site.server.worker_peak_bytes() < peaks[1] + 64 * MiB


# Tensors

SHAPES = {
    "a product of 2^64": [2**32, 2**32],
    "a product of 2^64 and more": [2**63 - 1, 2**63 - 1, 4],
    "2^63 - 1 of one": [2**63 - 1],
    "2^63 - 1 of none": [0, 2**63 - 1],
    "2^61, whose bytes are 2^63": [2**61],
    "below zero": [1, -256, -256],
    "the least": [-(2**63)],
    "300 axes": [1] * 300,
    "300 axes and a product beyond all": [2] * 300,
    "100,000 axes": [1] * 100_000,
    "larger than the data": [1, 256, 256],
}


def tensor(shape: list[int]) -> Tensor:
    return Tensor(dtype=DATA_TYPE_FLOAT32, shape=shape, data=bytes(4))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tensor_of_an_impossible_shape(site: Site, shape: list[int]) -> None:
    peak, image = site.server.peak_bytes(), Image(data=encode(picture(), "PNG"))
    given = {
        "prompts[0].mask_input": SegmentRequest(
            image=image, prompts=[Prompt(points=CLICK.points, mask_input=tensor(shape))]
        ),
        "image_embedding": SegmentRequest(image=image, prompts=[CLICK], image_embedding=tensor(shape)),
        "high_resolution_features[0]": SegmentRequest(
            image=image, prompts=[CLICK], image_embedding=Tensor(), high_resolution_features=[tensor(shape)]
        ),
    }
    for path, request in given.items():
        failure = site.failure(request)
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD"), (path, failure)
        if path != "high_resolution_features[0]":  # where the embedding beside it is wrong as well
            assert any(one.startswith(path) for one in failure.fields), failure
    with connect(site.server) as channel, RefineStream(channel, RefineConfig(image=image)) as stream:
        stream.opened()
        stream.edit(set_mask=tensor(shape))
        (violation, *_) = stream.rejected().violations
        assert violation.field.startswith("edit.set_mask")
        stream.edit(add_points=points((5, 5)))
        assert stream.result().prediction.masks
        stream.finish()
        assert stream.rest() == []
    site.serves()
    assert site.server.peak_bytes() < peak + 64 * MiB


# URIs

NOT_ALLOWED = (Code.PERMISSION_DENIED, "URI_NOT_ALLOWED")
NOT_FETCHED = (Code.FAILED_PRECONDITION, "IMAGE_FETCH_FAILED")
INVALID = (Code.INVALID_ARGUMENT, "INVALID_FIELD")


@pytest.mark.parametrize("host", DISGUISES)
def test_a_private_address_in_disguise(site: Site, host: str) -> None:
    """The operator allows the host by name, but not that it has a private address."""
    port = site.web.host.rpartition(":")[2]
    assert site.refusal(f"http://{host}:{port}/image") == NOT_ALLOWED
    assert site.web.asked == []
    site.serves()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://[fe80::1%25lo]:PORT/image", NOT_ALLOWED),
        ("http://[::1%25lo]:PORT/image", NOT_ALLOWED),
        ("http://[::1%251]:PORT/image", NOT_ALLOWED),
        ("http://[::ffff:127.0.0.1]:PORT/image", NOT_ALLOWED),
        ("http://0x7f.0.0.1:PORT/image", NOT_ALLOWED),
        ("http://0177.0.0.1:PORT/image", INVALID),
        ("http://127.0.0.1%00:PORT/image", NOT_ALLOWED),
        ("http://localhost%00.example.org:PORT/image", NOT_ALLOWED),
        ("http://user@localhost:PORT/image", NOT_ALLOWED),
        ("http://localhost:PORT@example.org/image", NOT_ALLOWED),
        ("gopher://localhost:PORT/image", INVALID),
        ("ftp://localhost:PORT/image", INVALID),
    ],
)
def test_a_url_that_is_not_what_it_seems(site: Site, uri: str, expected: tuple[Code, str]) -> None:
    port = site.web.host.rpartition(":")[2]
    assert site.refusal(uri.replace("PORT", port)) == expected
    assert site.web.asked == []
    site.serves()


@pytest.mark.parametrize(
    "target", ["/dev/zero", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "/proc/self/environ", "/proc/self/mem", "/"]
)
def test_what_is_no_file_of_the_folder(site: Site, target: str) -> None:
    link = site.root / "link"
    link.symlink_to(target)
    try:
        for path in (str(link), target, f"{link}/etc/passwd"):
            assert site.refusal(f"file://{path}") == NOT_ALLOWED
    finally:
        link.unlink()
    site.serves()


def test_pipes_and_sockets_in_the_folder(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.root)  # the name of a socket must be short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        for name in ("pipe", "socket"):
            assert site.refusal(f"file://{site.root}/{name}") == NOT_FETCHED
    site.serves()


def test_hosts_that_do_not_answer_hold_up_nobody_else(tmp_path: Path, web: Web) -> None:
    """More of them than a pool of threads usually has; the images of everybody else go through threads as well."""
    count = 32  # as many as the server asks at a time
    options = ("--allowed-host", web.host, "--allow-private-addresses", "--fetch-timeout", "120")
    good = SegmentRequest(image=Image(data=encode(picture(), "PNG")), prompts=[CLICK])
    hanging = SegmentRequest(image=Image(uri=f"http://{web.host}/hangs"), prompts=[CLICK])
    with ServerProcess(*options, log=tmp_path / "log") as server, connect(server) as channel:
        stub = SegmentationServiceStub(channel)
        calls = [stub.Segment.future(hanging, timeout=120) for _ in range(count + 8)]
        for _ in range(count):
            assert web.arrived.acquire(timeout=60)
        assert stub.Segment(good, timeout=60).predictions
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        web.proceed.set()
    web.proceed.clear()
    web.asked.clear()
