"""Images by path and URL, as far as the operator allows."""

import http.server
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of
from tests.server_process import ServerProcess, connect
from tests.web_server import web_server

NOT_ALLOWED = (grpc.StatusCode.PERMISSION_DENIED, "URI_NOT_ALLOWED")
NOT_FETCHED = (grpc.StatusCode.FAILED_PRECONDITION, "IMAGE_FETCH_FAILED")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, photo: bytes) -> Path:
    """A folder with a photo, beside one that nobody may read."""
    folder = tmp_path_factory.mktemp("media")
    root = folder / "root"
    root.mkdir()
    (root / "photo.jpg").write_bytes(photo)
    (folder / "secret.jpg").write_bytes(photo)
    (root / "link.jpg").symlink_to(folder / "secret.jpg")
    return root


@pytest.fixture(scope="module")
def web(media: Path) -> Iterator[str]:
    """A web server for the folder, as ``HOST:PORT``."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(media))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://169.254.169.254/latest/meta-data")
                self.end_headers()
            else:
                super().do_GET()

    with web_server(Handler) as host:
        yield host


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory, media: Path, web: str) -> Iterator[SegmentationServiceStub]:
    """A server that may read the folder and the web server."""
    allowed = ["--media-root", str(media), "--allowed-host", web, "--allow-private-addresses"]
    log = tmp_path_factory.mktemp("sources") / "log"
    with ServerProcess(*allowed, log=log) as server, connect(server) as channel:
        yield SegmentationServiceStub(channel)


def request(uri: str) -> SegmentRequest:
    return SegmentRequest(image=Image(uri=uri), prompts=[Prompt(points=[Point(x=1, y=1)])])


def test_a_file_below_a_media_root(stub: SegmentationServiceStub, media: Path) -> None:
    answer = stub.Segment(request(f"file://{media}/photo.jpg"))
    assert answer.image.width > 1
    again = SegmentRequest(image=Image(digest=answer.image.digest), prompts=[Prompt(points=[Point(x=1, y=1)])])
    assert stub.Segment(again).image == answer.image


@pytest.mark.parametrize("path", ["link.jpg", "../secret.jpg", "../nothing.jpg", "%2e%2e/secret.jpg"])
def test_a_file_outside_the_media_root(stub: SegmentationServiceStub, media: Path, path: str) -> None:
    failure = failure_of(lambda: stub.Segment(request(f"file://{media}/{path}")))
    assert (failure.code, failure.reason) == NOT_ALLOWED


def test_a_url_of_an_allowed_host(stub: SegmentationServiceStub, web: str) -> None:
    assert stub.Segment(request(f"http://{web}/photo.jpg")).image.width > 1


def test_a_url_that_does_not_answer(stub: SegmentationServiceStub, web: str) -> None:
    failure = failure_of(lambda: stub.Segment(request(f"http://{web}/nothing.jpg")))
    assert (failure.code, failure.reason) == NOT_FETCHED


def test_a_redirect_out_of_the_policy(stub: SegmentationServiceStub, web: str) -> None:
    failure = failure_of(lambda: stub.Segment(request(f"http://{web}/away")))
    assert (failure.code, failure.reason) == NOT_ALLOWED


def test_another_host(stub: SegmentationServiceStub) -> None:
    failure = failure_of(lambda: stub.Segment(request("http://127.0.0.1:9/photo.jpg")))
    assert (failure.code, failure.reason) == NOT_ALLOWED


def test_a_private_address_needs_permission(tmp_path: Path, web: str) -> None:
    with ServerProcess("--allowed-host", web, log=tmp_path / "log") as server, connect(server) as channel:
        stub = SegmentationServiceStub(channel)
        failure = failure_of(lambda: stub.Segment(request(f"http://{web}/photo.jpg")))
    assert (failure.code, failure.reason) == NOT_ALLOWED
