"""Metrics as Prometheus reads them from a real server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from segrpc.v1.refine_pb2 import RefineConfig
from segrpc.v1.segmentation_service_pb2 import EncodeImageRequest, SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of
from tests.blackbox.refine_stream import RefineStream, points
from tests.blackbox.scrape import METRICS, Scrape, scrape_until
from tests.checkpoints import write_checkpoint
from tests.server_process import ServerProcess, connect, raw

SEGMENT, REFINE = "segrpc.v1.SegmentationService/Segment", "segrpc.v1.SegmentationService/Refine"
MODEL = "sam2.1-hiera-tiny"
DASHBOARD = Path(__file__).parents[2] / "service" / "deploy" / "grafana" / "segrpc.json"
CLICK = [Prompt(points=[Point(x=30, y=20)])]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with SAM 2.1 tiny and metrics."""
    folder = tmp_path_factory.mktemp("measured")
    checkpoint = write_checkpoint(MODEL, folder)
    with ServerProcess("--checkpoint", str(checkpoint), "--threads", "2", *METRICS, log=folder / "log") as process:
        yield process


@pytest.fixture
def channel(measured: ServerProcess) -> Iterator[grpc.Channel]:
    with connect(measured) as opened:
        yield opened


def ended(name: str, method: str, status: str = "OK") -> tuple[str, dict[str, str]]:
    return f"grpc_server_call_{name}", {"grpc_method": method, "grpc_status": status}


def test_calls_are_measured_as_grpc_names_them(measured: ServerProcess, channel: grpc.Channel, photo: bytes) -> None:
    stub, before = SegmentationServiceStub(channel), Scrape(measured)
    request = SegmentRequest(request_id="mine", image=Image(data=photo), prompts=CLICK)
    answer = stub.Segment(request)
    bad = SegmentRequest(image=Image(data=photo))
    assert failure_of(lambda: stub.Segment(bad)).reason == "INVALID_FIELD"
    counted, labels = ended("duration_seconds_count", SEGMENT, "INVALID_ARGUMENT")
    after = scrape_until(measured, lambda now: now.value(counted, **labels) > before.value(counted, **labels))

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("grpc_server_call_started_total", grpc_method=SEGMENT) == 2
    assert grown(counted, **labels) == 1
    name, labels = ended("duration_seconds_count", SEGMENT)
    assert grown(name, **labels) == 1
    name, labels = ended("duration_seconds_sum", SEGMENT)
    assert grown(name, **labels) >= answer.timing.total.ToNanoseconds() / 1e9
    name, labels = ended("rcvd_total_compressed_message_size_bytes_sum", SEGMENT)
    assert grown(name, **labels) == request.ByteSize()
    name, labels = ended("sent_total_compressed_message_size_bytes_sum", SEGMENT)
    assert grown(name, **labels) == answer.ByteSize()
    assert after.types["grpc_server_call_duration_seconds"] == "histogram"
    assert after.types["grpc_server_call_started"] == "counter"


def test_health_checks_are_calls_too(measured: ServerProcess, channel: grpc.Channel) -> None:
    raw(channel, "/grpc.health.v1.Health/Check")(b"")
    name, labels = ended("duration_seconds_count", "grpc.health.v1.Health/Check")
    scrape_until(measured, lambda now: now.value(name, **labels) == 1)


def test_calls_of_unknown_methods_have_one_label(measured: ServerProcess, channel: grpc.Channel) -> None:
    before = Scrape(measured)
    for method in ("/mine/Secret1", "/mine/Secret2", "/segrpc.v1.SegmentationService/Secret3"):
        assert failure_of(lambda method=method: raw(channel, method)(b"")).code.name == "UNIMPLEMENTED"  # type: ignore[misc]
    name, labels = ended("duration_seconds_count", "other", "UNIMPLEMENTED")
    after = scrape_until(measured, lambda now: now.value(name, **labels) == before.value(name, **labels) + 3)
    assert after.value("grpc_server_call_started_total", grpc_method="other") >= 3
    assert not [labels for _, labels in after.samples if "Secret" in str(labels)]


def test_rounds_stages_and_batches_of_a_session(measured: ServerProcess, channel: grpc.Channel, photo: bytes) -> None:
    SegmentationServiceStub(channel).EncodeImage(EncodeImageRequest(image=Image(data=photo)))
    before = Scrape(measured)
    with RefineStream(channel, RefineConfig(image=Image(data=photo))) as stream:
        stream.opened()
        timings = []
        for i in range(3):
            stream.edit(add_points=points((30 + i, 20)))
            timings.append(stream.result().timing)
        open_ = Scrape(measured)
        assert (open_.value("segrpc_sessions", segrpc_state="attached"), open_.value("segrpc_calls_active")) == (1, 1)
        assert open_.value("segrpc_session_memory_bytes") > 0
        stream.finish()
        stream.rest()
    after = scrape_until(measured, lambda now: now.value("segrpc_calls_active") == 0)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, segrpc_model=MODEL, **labels) - before.value(name, segrpc_model=MODEL, **labels)

    assert grown("segrpc_computation_duration_seconds_count", segrpc_kind="round") == 3
    assert grown("segrpc_stage_duration_seconds_count", segrpc_stage="decode_mask") == 3
    told = sum(timing.decode_mask.ToNanoseconds() for timing in timings) / 1e9
    assert grown("segrpc_stage_duration_seconds_sum", segrpc_stage="decode_mask") == pytest.approx(told, abs=1e-6)
    assert grown("segrpc_stage_duration_seconds_count", segrpc_stage="encode_image") == 0
    assert grown("segrpc_decode_batch_size_sum") == grown("segrpc_decode_batch_size_count") == 3
    assert after.value("segrpc_sessions", segrpc_state="attached") == 0
    name, labels = ended("duration_seconds_count", REFINE)
    assert after.value(name, **labels) - before.value(name, **labels) == 1


def test_a_stream_whose_client_left_counts_as_cancelled(
    measured: ServerProcess, channel: grpc.Channel, photo: bytes
) -> None:
    cancelled, well = (ended("duration_seconds_count", REFINE, status) for status in ("CANCELLED", "OK"))
    before = Scrape(measured)
    with RefineStream(channel, RefineConfig(image=Image(data=photo))) as stream:
        stream.opened()
    after = scrape_until(measured, lambda now: now.value("segrpc_calls_active") == 0)
    grown = [after.value(name, **labels) - before.value(name, **labels) for name, labels in (cancelled, well)]
    assert grown == [1, 0]


def test_what_is_held_and_what_the_cache_did(measured: ServerProcess, channel: grpc.Channel) -> None:
    picture = (Path(__file__).parents[1] / "data" / "photos" / "coffee.jpg").read_bytes()
    stub, before = SegmentationServiceStub(channel), Scrape(measured)
    for _ in range(3):
        stub.Segment(SegmentRequest(image=Image(data=picture), prompts=CLICK))
    after = Scrape(measured)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("segrpc_embedding_cache_misses_total") == 1
    assert grown("segrpc_embedding_cache_hits_total") == 2
    assert grown("segrpc_encodes_total") == 1
    assert grown("segrpc_embedding_cache_entries", segrpc_tier="device") == 1
    assert grown("segrpc_embedding_cache_memory_bytes", segrpc_tier="device") > 16_000_000
    assert grown("segrpc_image_store_entries") == 1
    assert grown("segrpc_image_store_memory_bytes") == len(picture)
    for lane in ("encode", "decode"):
        assert after.value("segrpc_lane_depth", segrpc_lane=lane) == 0
    assert "segrpc_device_memory_bytes" not in after.names, "there is no GPU"
    assert after.value("segrpc_event_loop_lag_seconds_count") > 0


def test_a_worker_that_ends_is_counted(tmp_path: Path) -> None:
    with ServerProcess(*METRICS, log=tmp_path / "log") as server:
        assert Scrape(server).value("segrpc_workers") == 1
        (pid,) = server.stats()["engine"]["worker_pids"]
        os.kill(pid, signal.SIGKILL)
        scrape_until(server, lambda now: now.value("segrpc_worker_restarts_total") == 1)


def test_labels_have_nothing_that_clients_chose(measured: ServerProcess, channel: grpc.Channel) -> None:
    request = SegmentRequest(request_id="secret-1", session_id="secret-2", model="secret-3")
    assert failure_of(lambda: SegmentationServiceStub(channel).Segment(request)).reason == "MODEL_NOT_FOUND"
    assert failure_of(lambda: raw(channel, "/segrpc.v1.SegmentationService/secret4")(b"")).code.name == "UNIMPLEMENTED"
    name, labels = ended("duration_seconds_count", SEGMENT, "NOT_FOUND")
    after = scrape_until(measured, lambda now: now.value(name, **labels) > 0)
    assert not [labels for _, labels in after.samples if any("secret" in value for _, value in labels)]


def test_the_dashboard_asks_for_what_is_there(measured: ServerProcess, channel: grpc.Channel, photo: bytes) -> None:
    with RefineStream(channel, RefineConfig(image=Image(data=photo))) as stream:
        stream.opened()
        stream.edit(add_points=points((30, 20)))
        stream.result()
        stream.finish()
        stream.rest()
    name, labels = ended("duration_seconds_count", REFINE)
    there = scrape_until(
        measured, lambda now: now.value(name, **labels) > 0 and now.value("segrpc_event_loop_lag_seconds_count") > 0
    )
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [
        f"{variable['query']['query']}" for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    outside = re.compile(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)|, \w+\)$")  # labels and times
    names = {
        name for expression in asked for name in re.findall(r"[a-z_]{4,}(?![a-z_]*\()", outside.sub(" ", expression))
    }
    assert len(names) > 20
    # Without a GPU there is nothing to tell of one.
    assert names - there.names <= {"segrpc_device_memory_bytes"}
    selected = {label for expression in asked for label in re.findall(r"(\w+)[=!]~?\"", expression)}
    grouped = {
        label
        for expression in asked
        for found in re.findall(r"by \(([^)]*)\)", expression)
        for label in found.split(", ")
    }
    known = {label for _, pairs in there.samples for label, _ in pairs} | {"job", "instance"}  # Prometheus' own
    assert selected | grouped <= known | {"segrpc_device"}


def test_the_port_is_on_the_loopback_interface_unless_told(measured: ServerProcess) -> None:
    assert re.search(r"metrics are at http://127\.0\.0\.1:\d+/metrics", measured.log_text())


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "segrpc.service.cli", "serve", "--listen", "127.0.0.1:0"]
        result = subprocess.run(
            [*command, "--metrics-listen", address], capture_output=True, text=True, timeout=120, check=False
        )
    assert result.returncode == 1
    assert f"cannot listen on {address} for metrics" in result.stderr
    assert "Traceback" not in result.stderr
