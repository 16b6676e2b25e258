"""Clients that neither send nor read when it is their turn, or are gone, and connections that grow old."""

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from segrpc.v1.model_service_pb2 import ListModelsRequest
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import EDIT_POLICY_EVERY_EDIT, MovePoint, RefineConfig, Resume, UploadHeader
from segrpc.v1.segmentation_service_pb2 import UploadImageRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, OutputOptions
from tests.blackbox.failure import parse
from tests.blackbox.refine_stream import RefineStream, points
from tests.photos import photo_bytes
from tests.server_process import NARROW, ServerProcess, connect
from tests.tcp_proxy import TcpProxy

STALL_SECONDS = 1.0
PHOTO = photo_bytes("chelsea")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("stalls") / "log"
    options = ("--stall-seconds", str(STALL_SECONDS), "--keepalive-seconds", "3", "--max-connection-age-seconds", "1")
    with ServerProcess(*options, log=log) as process:
        yield process


def assert_due(error: grpc.RpcError, due: str) -> None:
    failure = parse(error)
    assert failure.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert due in failure.message
    assert "stall_seconds" in failure.message


def test_a_config_that_does_not_come(server: ServerProcess) -> None:
    before = server.stats()
    with connect(server) as channel, RefineStream(channel) as stream:
        with pytest.raises(grpc.RpcError) as caught:
            stream.next()
        assert_due(caught.value, "the config")
    server.settle(before)


def test_a_chunk_that_does_not_come_over_a_session(server: ServerProcess) -> None:
    before = server.stats()
    config = RefineConfig(upload=UploadHeader(size=len(PHOTO)))
    with connect(server) as channel, RefineStream(channel, config) as stream:
        stream.upload(PHOTO[:1000])
        assert stream.next().upload.received_size == 1000
        with pytest.raises(grpc.RpcError) as caught:
            stream.next()
        assert_due(caught.value, "a chunk")
    server.settle(before)


@pytest.mark.parametrize("started", [False, True])
def test_a_chunk_that_does_not_come_in_an_upload(server: ServerProcess, started: bool) -> None:
    before = server.stats()
    messages: queue.SimpleQueue[UploadImageRequest | None] = queue.SimpleQueue()
    if started:
        messages.put(UploadImageRequest(header=UploadHeader(size=len(PHOTO))))
    with connect(server) as channel:
        call: Any = SegmentationServiceStub(channel).UploadImage.future(iter(messages.get, None), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
        assert_due(caught.value, "a chunk" if started else "the header")
        messages.put(None)
    server.settle(before)


def test_answers_that_are_not_read(server: ServerProcess) -> None:
    before, count = server.stats(), 30
    config = RefineConfig(
        image=Image(data=PHOTO),
        edit_policy=EDIT_POLICY_EVERY_EDIT,
        output=OutputOptions(return_logits=True),  # 256 KiB each
    )
    with connect(server, *NARROW) as channel:
        with RefineStream(channel, config) as stream:
            opened = stream.opened().opened
            stream.edit(add_points=points((200, 150), ids=("a",)))
            for i in range(1, count):
                stream.edit(move_point=MovePoint(point_id="a", x=200 + i, y=150))
            # The stream is over and its session kept; what is on its way to the client stays there.
            server.wait_for(lambda stats: stats["attached_sessions"] == 0 and stats["sessions"] == 1)
        resume = Resume(session_id=opened.session_id, resume_token=opened.resume_token)
        with RefineStream(channel, RefineConfig(resume=resume)) as stream:
            assert stream.opened().opened.session_id == opened.session_id
            seq = 2 * count + 2
            stream.edit(seq=seq, move_point=MovePoint(point_id="a", x=180, y=140))
            while stream.next().applied_seq < seq:
                pass
            stream.finish()
            stream.rest()
    server.settle(before)


def test_a_client_that_vanishes(server: ServerProcess) -> None:
    before = server.stats()
    with (
        TcpProxy(server.target) as proxy,
        connect(proxy) as channel,
        RefineStream(channel, RefineConfig(image=Image(data=PHOTO))) as stream,
    ):
        opened = stream.opened().opened
        proxy.swallow_answers()
        server.wait_for(lambda stats: stats["attached_sessions"] == 0 and stats["sessions"] == 1, 90)
    resume = Resume(session_id=opened.session_id, resume_token=opened.resume_token)
    with connect(server) as channel, RefineStream(channel, RefineConfig(resume=resume)) as stream:
        assert stream.opened().opened.session_id == opened.session_id
        stream.finish()
        stream.rest()
    server.settle(before)


def test_a_session_outlives_the_age_of_its_connection(server: ServerProcess) -> None:
    config = RefineConfig(image=Image(data=PHOTO))
    with (
        TcpProxy(server.target) as proxy,
        connect(proxy) as channel,
        RefineStream(channel, config) as stream,
    ):
        stream.opened()
        models = ModelServiceStub(channel)
        while proxy.connections == 1:  # until calls go over another connection: the first is too old
            models.ListModels(ListModelsRequest(), timeout=30)
        stream.edit(add_points=points((200, 150)))
        assert stream.result().shown_revision == 1
        stream.finish()
        assert stream.rest() == []
