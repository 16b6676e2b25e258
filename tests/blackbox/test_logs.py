"""The log of requests, as an operator's programs read it."""

import json
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest

from segrpc.v1.model_service_pb2 import GetModelRequest
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import RefineConfig, UploadHeader
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of
from tests.blackbox.refine_stream import METHOD, RefineStream, points
from tests.server_process import ServerProcess, connect, raw
from tests.tcp_proxy import TcpProxy
from tests.third_party import config_of_gated

SEGMENT = "/segrpc.v1.SegmentationService/Segment"
CLICK = [Prompt(points=[Point(x=30, y=20)])]
HOSTILE = "x\n2030-01-01 INFO segrpc.rpc forged\x1b[2J"


@pytest.fixture(scope="module")
def json_server(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[ServerProcess]:
    """A server with a cheap model that logs everything, as JSON."""
    folder = tmp_path_factory.mktemp("json-server")
    config = folder / "config.toml"
    config.write_text(config_of_gated(folder))
    options = ["--config", str(config), "--log-format", "json", "--log-level", "debug"]
    with ServerProcess(*options, log=folder / "log", environment=third_party) as process:
        yield process


@pytest.fixture
def channel(json_server: ServerProcess) -> Iterator[grpc.Channel]:
    with connect(json_server) as opened:
        yield opened


def records(server: ServerProcess, **fields: Any) -> list[dict[str, Any]]:
    """All that the server logged with these values."""
    found = [json.loads(line) for line in server.log_text().splitlines()]
    return [record for record in found if record.items() >= fields.items()]


def record_of(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """The one line of a call, which is logged after it is answered."""
    server.wait_for(lambda _: bool(records(server, level="INFO", **fields)))
    (record,) = records(server, level="INFO", **fields)
    return record


def test_a_call_is_one_line_with_all_that_is_known_of_it(
    json_server: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    request = SegmentRequest(request_id="first", image=Image(data=photo), prompts=CLICK)
    answer = SegmentationServiceStub(channel).Segment(request)
    record = record_of(json_server, request_id="first")
    assert (record["message"], record["logger"], record["status"]) == (SEGMENT, "segrpc.rpc", "OK")
    assert (record["model"], record["embedding_cached"]) == ("gated", False)
    assert (record["received_bytes"], record["sent_bytes"]) == (request.ByteSize(), answer.ByteSize())
    for stage in ("queue", "decode_image", "encode_image", "decode_mask", "postprocess"):
        told = getattr(answer.timing, stage)
        assert record[f"{stage}_ms"] == pytest.approx(told.ToNanoseconds() / 1e6, abs=0.002)
    assert record["duration_ms"] >= answer.timing.total.ToNanoseconds() / 1e6
    assert not {"principal", "reason", "error", "rounds"} & record.keys()


def test_a_failure_tells_what_was_wrong(json_server: ServerProcess, channel: grpc.Channel) -> None:
    failure = failure_of(lambda: SegmentationServiceStub(channel).Segment(SegmentRequest(request_id="bad", model="no")))
    record = record_of(json_server, request_id="bad")
    assert (record["status"], record["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert record["error"] == failure.message
    assert "model" not in record


def test_bytes_that_are_no_message_are_counted(json_server: ServerProcess, channel: grpc.Channel) -> None:
    assert failure_of(lambda: raw(channel, SEGMENT)(b"\xff" * 77)).reason == "MALFORMED_MESSAGE"
    assert record_of(json_server, reason="MALFORMED_MESSAGE")["received_bytes"] == 77


def test_a_stream_is_one_line_and_each_round_one_for_debugging(
    json_server: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    with RefineStream(channel, RefineConfig(request_id="stream", image=Image(data=photo))) as stream:
        stream.opened()
        for i in range(3):
            stream.edit(add_points=points((30 + i, 20)))
            stream.result()
        stream.finish()
        stream.rest()
    record = record_of(json_server, request_id="stream")
    assert (record["message"], record["status"], record["finished"]) == (METHOD, "OK", True)
    assert (record["edits"], record["rounds"]) == (3, 3)
    assert record["decode_mask_ms"] > record["max_decode_mask_ms"] > 0
    assert record["sent_bytes"] == sum(response.ByteSize() for response in stream.seen)
    rounds = records(json_server, level="DEBUG", request_id="stream", message=f"{METHOD} round")
    assert len(rounds) == 3
    assert sum(one["decode_mask_ms"] for one in rounds) == pytest.approx(record["decode_mask_ms"], abs=0.01)
    assert max(one["decode_mask_ms"] for one in rounds) == record["max_decode_mask_ms"]


def test_a_stream_that_breaks_off_did_not_finish(
    json_server: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    with RefineStream(channel, RefineConfig(request_id="broken off", image=Image(data=photo))) as stream:
        stream.opened()
    record = record_of(json_server, request_id="broken off")
    assert (record["status"], record["finished"]) == ("CANCELLED", False)
    assert not {"reason", "error"} & record.keys()


def test_an_upload_that_breaks_off_is_no_fault_of_what_came(
    json_server: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    config = RefineConfig(request_id="half an image", upload=UploadHeader(size=len(photo)))
    with RefineStream(channel, config) as stream:
        stream.upload(photo[:1000])
        stream.next()
    record = record_of(json_server, request_id="half an image")
    assert record["status"] == "CANCELLED"
    assert not {"reason", "error"} & record.keys()


@pytest.mark.parametrize("way", ["cut", "reset"])
def test_a_stream_whose_connection_broke_was_cancelled(
    json_server: ServerProcess, photo: bytes, way: Literal["cut", "reset"]
) -> None:
    with (
        TcpProxy(json_server.target) as proxy,
        connect(proxy) as opened,
        RefineStream(opened, RefineConfig(request_id=f"it was {way}", image=Image(data=photo))) as stream,
    ):
        stream.opened()
        getattr(proxy, way)()
        record = record_of(json_server, request_id=f"it was {way}")
    assert (record["status"], record["finished"]) == ("CANCELLED", False)


def test_a_stream_that_is_half_closed_ends_well_without_finishing(
    json_server: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    with RefineStream(channel, RefineConfig(request_id="half-closed", image=Image(data=photo))) as stream:
        stream.opened()
        stream.half_close()
        stream.rest()
    record = record_of(json_server, request_id="half-closed")
    assert (record["status"], record["finished"]) == ("OK", False)


def test_a_deadline_that_passed_is_told_as_such(
    json_server: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    config = RefineConfig(request_id="late", image=Image(data=photo))
    with RefineStream(channel, config, timeout=2.0) as stream:
        assert stream.failure().code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert record_of(json_server, request_id="late")["status"] == "DEADLINE_EXCEEDED"


def test_the_worker_logs_in_the_same_format(tmp_path: Path) -> None:
    with ServerProcess("--log-format", "json", log=tmp_path / "log") as server:
        (pid,) = server.stats()["engine"]["worker_pids"]
        ended = os.pidfd_open(pid)
        try:
            server.process.kill()  # the worker says that it noticed, and ends
            assert select.select([ended], [], [], 30)[0]
        finally:
            os.close(ended)
        (record,) = records(server, logger="segrpc.worker")
    assert record["message"] == "the server is gone: the worker ends"


def test_what_a_client_sends_cannot_forge_lines(tmp_path: Path) -> None:
    with ServerProcess(log=tmp_path / "log") as server, connect(server) as opened:
        stub = ModelServiceStub(opened)
        assert failure_of(lambda: stub.GetModel(GetModelRequest(name=HOSTILE))).reason == "MODEL_NOT_FOUND"
        request = SegmentRequest(request_id=HOSTILE, session_id=HOSTILE, prompts=CLICK, reset_predictor=False)
        assert failure_of(lambda: SegmentationServiceStub(opened).Segment(request)).reason == "NO_PREDICTOR_STATE"
        server.wait_for(lambda _: "NO_PREDICTOR_STATE" in server.log_text())
        lines = server.log_text().splitlines()
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("2030") for line in lines)
    (line,) = [line for line in lines if "NO_PREDICTOR_STATE" in line]
    assert f"request_id={HOSTILE!r}" in line
