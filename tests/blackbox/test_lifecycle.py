"""From the first prompt to the last: when a server says that it serves, when it says no more, and how it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from segrpc.v1.model_service_pb2 import ListModelsRequest
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import EDIT_POLICY_EVERY_EDIT, RefineConfig
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Prompt
from tests.blackbox.failure import failure_of
from tests.blackbox.gate import Gate
from tests.blackbox.refine_stream import RefineStream, points, results
from tests.photos import photo_bytes
from tests.server_process import ServerProcess, connect

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
SEGMENTATION, MODELS, LIVENESS = "segrpc.v1.SegmentationService", "segrpc.v1.ModelService", "grpc.health.v1.Health"

GATED = """
[[models]]
name = "gated"
model_params = { gates = "GATES" }
"""


def watch(channel: grpc.Channel, service: str = "") -> Callable[[], int]:
    """Watch a service's health; each call of what is returned waits for the next status."""
    stub: Any = HealthStub(channel)  # its types lack its methods
    statuses = stub.Watch(HealthCheckRequest(service=service), timeout=120)
    return lambda: int(next(statuses).status)


def health(channel: grpc.Channel, service: str) -> int:
    stub: Any = HealthStub(channel)  # its types lack its methods
    return int(stub.Check(HealthCheckRequest(service=service)).status)


def request(x: float = 20) -> SegmentRequest:
    return SegmentRequest(image=Image(data=photo_bytes("chelsea")), prompts=[Prompt(points=points((x, 20)).points)])


# The start


def failed_start(environment: dict[str, str], *options: str) -> str:
    """Start a server that must fail, with status 1; return its last words."""
    command = [sys.executable, "-m", "segrpc.service.cli", "serve", "--listen", "127.0.0.1:0", *options]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("engine", ["process", "inline"])
def test_a_model_that_does_not_answer_is_an_error_of_the_start(third_party: dict[str, str], engine: str) -> None:
    said = failed_start(third_party, "--model", "unready", "--engine", engine)
    assert said == "segrpc-server: model 'unready' cannot answer a first prompt: KeyError: 'the first prompt'"


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    folder = tmp_path / "gates"
    folder.mkdir()
    (tmp_path / "config.toml").write_text(GATED.replace("GATES", str(folder)))
    return folder


@pytest.fixture
def gated(tmp_path: Path, gates: Path, third_party: dict[str, str]) -> Iterator[ServerProcess]:
    """A server with the model ``gated``."""
    config = tmp_path / "config.toml"
    with ServerProcess("--config", str(config), log=tmp_path / "log", environment=third_party) as server:
        yield server


@pytest.mark.parametrize("stage", ["load", "embed", "decode"])
def test_a_model_that_ends_its_process_is_an_error_of_the_start(
    tmp_path: Path, gates: Path, third_party: dict[str, str], stage: str
) -> None:
    (gates / f"exit.{stage}").touch()
    said = failed_start(third_party, "--config", str(tmp_path / "config.toml"))
    if stage == "load":
        assert "a worker ended with status 4 while it loaded the models" in said
    else:
        assert said.startswith("segrpc-server: model 'gated' ended its process at the first prompt")


def test_what_serves_has_answered(gated: ServerProcess, gates: Path) -> None:
    assert Gate(gates).decodes == 1
    with connect(gated) as channel:
        assert [health(channel, name) for name in ("", SEGMENTATION, MODELS, LIVENESS)] == [SERVING] * 4


# A crash loop


@pytest.mark.parametrize("stage", ["load", "decode"])
def test_a_crash_loop_is_told_and_ends(gated: ServerProcess, gates: Path, stage: str) -> None:
    with connect(gated) as channel, connect(gated) as other, ThreadPoolExecutor() as threads:
        segment = SegmentationServiceStub(channel).Segment
        whole, service = watch(channel), watch(channel, SEGMENTATION)
        assert whole() == service() == SERVING
        (gates / f"exit.{stage}").touch()
        (pid,) = gated.stats()["engine"]["worker_pids"]
        os.kill(pid, signal.SIGKILL)
        # One after the other, so that there is always somebody whom no worker can answer.
        calls = threads.submit(lambda: [failure_of(lambda: segment(request(), timeout=60)) for _ in range(4)])
        assert whole() == service() == NOT_SERVING
        for failure in calls.result():
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_UNAVAILABLE")
            assert failure.retry_delay
        # Calls do not wait for a worker any more.
        failure = failure_of(lambda: segment(request(), timeout=5))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_UNAVAILABLE")
        config = RefineConfig(image=Image(data=photo_bytes("chelsea")))
        with RefineStream(channel, config, timeout=10) as stream:
            stream.opened()
            stream.edit(add_points=points((20, 20)))
            assert stream.rejected().reason == "WORKER_UNAVAILABLE"
        # What needs no worker goes on.
        assert [health(other, name) for name in ("", MODELS, LIVENESS)] == [NOT_SERVING, SERVING, SERVING]
        assert len(ModelServiceStub(other).ListModels(ListModelsRequest()).models) == 1
        (line,) = [line for line in gated.log_text().splitlines() if "CRITICAL" in line]
        assert "worker processes in a row ended before they answered anything: calls are refused" in line
        (gates / f"exit.{stage}").unlink()
        assert whole() == service() == SERVING
        assert len(segment(request(), timeout=60).predictions) == 1
        assert "Traceback" not in gated.log_text()


def test_a_server_in_a_crash_loop_ends_with_status_0(gated: ServerProcess, gates: Path) -> None:
    (gates / "exit.load").touch()
    (pid,) = gated.stats()["engine"]["worker_pids"]
    os.kill(pid, signal.SIGKILL)
    gated.terminate()
    assert gated.wait() == 0
    assert "Traceback" not in gated.log_text()


# SIGTERM

STREAMS = 100
ANSWERED, PENDING = [(20.0, 12.0), (40.0, 30.0)], [(8.0, 8.0), (50.0, 20.0)]  # clicks of each stream


def test_a_hundred_streams_lose_no_edit_at_sigterm(tmp_path: Path, gates: Path, third_party: dict[str, str]) -> None:
    gate = Gate(gates)
    # The time to drain is longer than any test: what ends before it ends by itself.
    options = [
        "--config",
        str(tmp_path / "config.toml"),
        "--drain-seconds",
        "600",
        "--max-pending-decodes",
        str(STREAMS),
    ]
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(*options, log=tmp_path / "log", environment=third_party))
        channels = [stack.enter_context(connect(server)) for _ in range(4)]
        whole, alive = watch(channels[0]), watch(channels[0], LIVENESS)
        assert whole() == alive() == SERVING
        config = RefineConfig(image=Image(data=photo_bytes("chelsea")), edit_policy=EDIT_POLICY_EVERY_EDIT)
        streams = [
            stack.enter_context(RefineStream(channels[i % len(channels)], config, timeout=120)) for i in range(STREAMS)
        ]
        for stream in streams:
            stream.opened()
            send_clicks(stream, ANSWERED)
        for stream in streams:
            assert [stream.next().applied_seq for _ in ANSWERED] == [2, 4]
        gate.hold("decode")
        for stream in streams:
            send_clicks(stream, PENDING)
        for stream in streams:
            stream.barrier()
        gate.wait_until_held("decode")
        server.terminate()
        for stream in streams:
            response = stream.next()
            assert response.draining.close_time.seconds > 0, response
            assert response.applied_seq == 4
        assert whole() == NOT_SERVING
        assert [health(channels[0], name) for name in (SEGMENTATION, LIVENESS)] == [NOT_SERVING, SERVING]
        gate.release("decode")
        for stream in streams:
            stream.finish()
        for stream in streams:
            answers = stream.rest()
            assert [answer.applied_seq for answer in answers if answer.HasField("result")] == [6, 8]
            rounds = [one for answer in results(stream.seen) for one in answer.result.rounds]
            assert [one.revision for one in rounds] == [1, 2, 3, 4]
            assert [(point.x, point.y) for point in rounds[-1].prompt.points] == ANSWERED + PENDING
            assert sum(answer.HasField("draining") for answer in stream.seen) == 1
        assert server.wait() == 0
        assert "Traceback" not in server.log_text()
        assert "cut off" not in server.log_text()


def send_clicks(stream: RefineStream, clicks: list[tuple[float, float]]) -> None:
    for click in clicks:
        stream.edit(add_points=points(click))
