"""The service for operators, on its own port."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from segrpc.admin.v1.admin_service_pb2 import DrainRequest, FlushCachesRequest, GetStatisticsRequest
from segrpc.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from segrpc.v1.refine_pb2 import RefineConfig
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of
from tests.blackbox.frames import NAMELESS
from tests.blackbox.refine_stream import RefineStream, points
from tests.server_process import ServerProcess, connect, raw
from tests.third_party import config_of_gated

CLICK = [Prompt(points=[Point(x=30, y=20)])]
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


@dataclass
class Site:
    """A server, and the two connections to it."""

    server: ServerProcess
    admin: AdminServiceStub
    admin_channel: grpc.Channel
    channel: grpc.Channel

    def segment(self, image: Image) -> bool:
        """Ask for a mask; return whether the embedding was at hand."""
        answer = SegmentationServiceStub(self.channel).Segment(SegmentRequest(image=image, prompts=CLICK))
        return answer.timing.embedding_cached


def open_site(*options: str, log: Path, environment: dict[str, str] | None = None) -> Iterator[Site]:
    with (
        ServerProcess("--admin-listen", "0", *options, log=log, environment=environment) as server,
        connect(server) as channel,
    ):
        (target,) = re.findall(r"administration is on (\S+)", server.log_text())
        with grpc.insecure_channel(target) as admin:
            yield Site(server, AdminServiceStub(admin), admin, channel)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with the GrabCut model."""
    yield from open_site(log=tmp_path_factory.mktemp("site") / "log")


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """Such a server for a single test."""
    yield from open_site(log=tmp_path / "log")


@pytest.fixture(scope="module")
def light_site(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Site]:
    """A server with a cheap model whose embeddings are kept."""
    folder = tmp_path_factory.mktemp("light-site")
    config = folder / "config.toml"
    config.write_text(config_of_gated(folder))
    yield from open_site("--config", str(config), log=folder / "log", environment=third_party)


def test_statistics_are_those_of_the_process(light_site: Site, photo: bytes) -> None:
    config = RefineConfig(image=Image(data=photo))
    with RefineStream(light_site.channel, config) as stream:
        stream.opened()
        stream.edit(add_points=points((30, 20)))
        stream.result()
        light_site.server.wait_for(lambda stats: stats["engine"]["pending"] == 0)
        told, expected = light_site.admin.GetStatistics(GetStatisticsRequest()), light_site.server.stats()
        assert (told.calls, told.sessions, told.attached_sessions, told.draining) == (1, 1, 1, False)
        for name in ("session_bytes", "images", "image_bytes"):
            assert getattr(told, name) == expected[name] > 0
        assert (dict(told.taken), dict(told.limits)) == (expected["taken"], expected["limits"])
        assert told.limits["max_streams"] > told.taken["max_streams"] == 1
        stream.finish()
        stream.rest()
    as_given: dict[str, Any] = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
    engine = MessageToDict(told.engine, **as_given)  # 64-bit numbers are strings in JSON
    assert {
        name: [int(one) for one in value] if isinstance(value, list) else int(value) for name, value in engine.items()
    } == expected["engine"]
    assert told.engine.cached_embeddings > 0


def test_flushed_embeddings_are_made_again(light_site: Site, photo: bytes) -> None:
    light_site.segment(Image(data=photo))
    assert light_site.segment(Image(data=photo))
    held = light_site.admin.GetStatistics(GetStatisticsRequest())
    flushed = light_site.admin.FlushCaches(FlushCachesRequest(embeddings=True))
    assert (flushed.embeddings, flushed.embedding_bytes) == (held.engine.cached_embeddings, held.engine.cached_bytes)
    assert flushed.embedding_bytes > 100_000
    assert (flushed.images, flushed.image_bytes) == (0, 0)
    assert light_site.admin.GetStatistics(GetStatisticsRequest()).engine.cached_embeddings == 0
    assert not light_site.segment(Image(data=photo))


def test_flushed_images_are_unknown_but_to_sessions(site: Site, photo: bytes) -> None:
    config = RefineConfig(image=Image(data=photo))
    with RefineStream(site.channel, config) as stream:
        digest = stream.opened().opened.image.digest
        flushed = site.admin.FlushCaches(FlushCachesRequest(images=True))
        assert (flushed.images, flushed.image_bytes, flushed.embeddings) == (1, len(photo), 0)
        assert failure_of(lambda: site.segment(Image(digest=digest))).reason == "IMAGE_NOT_FOUND"
        stream.edit(add_points=points((30, 20)))
        assert stream.result().prediction.masks


def test_nothing_to_flush_is_a_mistake(site: Site) -> None:
    failure = failure_of(lambda: site.admin.FlushCaches(FlushCachesRequest()))
    assert (failure.reason, failure.fields) == ("INVALID_FIELD", ("embeddings",))


def test_draining_waits_for_calls_and_leaves_the_process_running(own_site: Site, photo: bytes) -> None:
    site = own_site
    failure = failure_of(lambda: site.admin.Drain(DrainRequest(timeout=Duration(seconds=-1))))
    assert (failure.reason, failure.fields) == ("INVALID_FIELD", ("timeout",))
    health = raw(site.channel, "/grpc.health.v1.Health/Check")
    assert health(b"") == SERVING
    with ThreadPoolExecutor() as threads, RefineStream(site.channel, RefineConfig(image=Image(data=photo))) as stream:
        stream.opened()
        assert site.admin.Drain(DrainRequest(timeout=Duration())).calls == 1
        assert stream.next().HasField("draining")
        assert health(b"") == NOT_SERVING
        failure = failure_of(lambda: site.segment(Image(data=photo)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert site.admin.GetStatistics(GetStatisticsRequest()).draining
        drained = threads.submit(lambda: site.admin.Drain(DrainRequest()))
        stream.edit(add_points=points((30, 20)))
        assert stream.result().prediction.masks
        stream.finish()
        stream.rest()
        assert drained.result().calls == 0
    assert site.server.process.poll() is None
    site.server.terminate()
    assert site.server.wait() == 0
    assert "Traceback" not in site.server.log_text()


def test_the_ports_are_apart(site: Site) -> None:
    for channel, method in (
        (site.channel, "/segrpc.admin.v1.AdminService/GetStatistics"),
        (site.admin_channel, "/segrpc.v1.ModelService/ListModels"),
    ):
        assert failure_of(lambda channel=channel, method=method: raw(channel, method)(b"")).code.name == "UNIMPLEMENTED"  # type: ignore[misc]


def test_bytes_that_are_no_message_are_answered(site: Site) -> None:
    drain = raw(site.admin_channel, "/segrpc.admin.v1.AdminService/Drain")
    assert failure_of(lambda: drain(b"\xff")).reason == "MALFORMED_MESSAGE"
    assert not site.admin.GetStatistics(GetStatisticsRequest()).draining


def test_reflection_describes_it(site: Site) -> None:
    method = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    reflect: Any = site.admin_channel.stream_stream(method)
    assert b"segrpc.admin.v1.AdminService" in next(reflect(iter([b":\x00"])))  # list_services


def failed(address: str) -> str:
    command = [
        sys.executable,
        "-m",
        "segrpc.service.cli",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        address,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_method_whose_name_is_no_text(site: Site) -> None:
    (target,) = re.findall(r"administration is on (\S+)", site.server.log_text())
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(NAMELESS)
        with suppress(ConnectionError):
            while connection.recv(2**16):
                pass
    with grpc.insecure_channel(target) as admin:
        told = AdminServiceStub(admin).GetStatistics(GetStatisticsRequest(), timeout=20, wait_for_ready=True)
    assert not told.draining
    assert "grpc stopped serving for administration" in site.server.log_text()
    with connect(site.server) as channel:  # whose port was not touched
        assert raw(channel, "/grpc.health.v1.Health/Check")(b"") == SERVING


def test_it_does_not_listen_beyond_this_machine() -> None:
    assert "admin_listen 0.0.0.0:9465 must be on the loopback interface" in failed("0.0.0.0:9465")


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address} for administration" in failed(address)
