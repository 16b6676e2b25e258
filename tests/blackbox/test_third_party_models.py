"""Models from an installed package: served, and kept apart from clients when they fail."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from segrpc.client import SegmentationClient
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of, parse
from tests.photos import load_image, photo_bytes
from tests.server_process import ServerProcess, connect

CONFIG = """
max_pending_encodes = 1

[[models]]
name = "bright"
model = "brightness"
model_params = { threshold = 100 }

[[models]]
name = "broken"

[[models]]
name = "hungry"

[[models]]
name = "patient"
model_params = { started = "STARTED", proceed = "PROCEED" }
"""


class Patient:
    """The named pipes through which a test watches and holds the model ``patient``."""

    def __init__(self, folder: Path) -> None:
        self.started, self.proceed = folder / "started", folder / "proceed"
        os.mkfifo(self.started)
        os.mkfifo(self.proceed)

    def wait_until_started(self) -> None:
        """Return once the model is at work."""
        assert self.started.read_text() == "started\n"

    def let_proceed(self) -> None:
        """Let the model finish."""
        self.proceed.write_text("go\n")


def request(model: str) -> SegmentRequest:
    prompt = Prompt(points=[Point(x=10, y=10)])
    return SegmentRequest(model=model, image=Image(data=photo_bytes("chelsea")), prompts=[prompt])


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return Patient(tmp_path)


@pytest.fixture
def own_server(tmp_path: Path, third_party: dict[str, str], patient: Patient) -> Iterator[ServerProcess]:
    """A server of the test's own with the third party's models."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.replace("STARTED", str(patient.started)).replace("PROCEED", str(patient.proceed)))
    with ServerProcess("--config", str(config), log=tmp_path / "log", environment=third_party) as process:
        yield process


@pytest.fixture
def stub(own_server: ServerProcess) -> Iterator[SegmentationServiceStub]:
    with connect(own_server) as channel:
        yield SegmentationServiceStub(channel)


def test_a_model_that_offers_only_predict_is_served(own_server: ServerProcess) -> None:
    photo = load_image("chelsea")
    with SegmentationClient(own_server.target) as client:
        assert [model.name for model in client.models()] == ["bright", "broken", "hungry", "patient"]
        result = client.segment(photo, points=[(10, 10)])
    assert result.model == "bright"
    np.testing.assert_array_equal(result.predictions[0].masks[0].array, np.asarray(photo).mean(axis=2) > 100)


def test_a_bug_is_hidden_from_clients_and_logged(own_server: ServerProcess, stub: SegmentationServiceStub) -> None:
    failure = failure_of(lambda: stub.Segment(request("broken")))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.reason == "INTERNAL"
    assert "secret" not in failure.message
    error_id = failure.message.rpartition(" ")[2]
    log = own_server.log_text()
    assert error_id in log
    assert "a secret that clients must not see" in log


def test_a_model_without_memory(stub: SegmentationServiceStub) -> None:
    failure = failure_of(lambda: stub.Segment(request("hungry")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")


def test_a_full_queue_refuses(stub: SegmentationServiceStub, patient: Patient) -> None:
    with ThreadPoolExecutor() as threads:
        first = threads.submit(stub.Segment, request("patient"))
        patient.wait_until_started()
        failure = failure_of(lambda: stub.Segment(request("bright")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert failure.retry_delay is not None
        assert failure.retry_delay > 0
        patient.let_proceed()
        assert len(first.result().predictions) == 1
    assert len(stub.Segment(request("bright")).predictions) == 1


def test_a_deadline_that_passes_frees_the_caller_at_once(stub: SegmentationServiceStub, patient: Patient) -> None:
    with ThreadPoolExecutor() as threads:
        call = threads.submit(failure_of, lambda: stub.Segment(request("patient"), timeout=1.0))
        patient.wait_until_started()
        # The model is held until the caller has gone.
        assert call.result().code is grpc.StatusCode.DEADLINE_EXCEEDED
        patient.let_proceed()


def test_sigterm_finishes_what_runs_refuses_the_rest_and_exits_with_0(
    own_server: ServerProcess, stub: SegmentationServiceStub, patient: Patient
) -> None:
    with ThreadPoolExecutor() as threads, connect(own_server) as channel:
        stub_of_health: Any = HealthStub(channel)  # its types lack Watch
        health = stub_of_health.Watch(HealthCheckRequest())
        assert next(health).status == HealthCheckResponse.SERVING
        running = threads.submit(stub.Segment, request("patient"))
        patient.wait_until_started()
        own_server.terminate()
        assert next(health).status == HealthCheckResponse.NOT_SERVING
        failure = failure_of(lambda: stub.Segment(request("bright")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert failure.retry_delay is not None
        patient.let_proceed()
        assert len(running.result().predictions) == 1
    assert own_server.wait() == 0


def test_a_second_sigterm_does_not_cut_calls_off(
    own_server: ServerProcess, stub: SegmentationServiceStub, patient: Patient
) -> None:
    call = stub.Segment.future(request("patient"))
    patient.wait_until_started()
    own_server.terminate()
    own_server.terminate()
    patient.let_proceed()
    try:
        assert len(call.result().predictions) == 1
    except grpc.RpcError as error:
        pytest.fail(f"the call was cut off: {parse(error)}")
    assert own_server.wait() == 0
