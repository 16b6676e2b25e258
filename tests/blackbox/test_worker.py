"""The server's process and its workers, seen from outside: what each loads, and calls while workers are killed."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.server_process import ServerProcess, connect


def workers_of(server: ServerProcess) -> list[int]:
    """The processes that the server started."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return sorted({int(pid) for file in children for pid in file.read_text().split()})


def maps(pid: int) -> str:
    """The files that a process has in its memory."""
    return Path(f"/proc/{pid}/maps").read_text()


def request(photo: bytes, x: float) -> SegmentRequest:
    return SegmentRequest(image=Image(data=photo), prompts=[Prompt(points=[Point(x=x, y=20)])])


def test_only_the_worker_loads_torch(sam2_server: ServerProcess) -> None:
    (worker,) = workers_of(sam2_server)
    assert "libtorch" in maps(worker)
    assert "libtorch" not in maps(sam2_server.process.pid)


def test_without_a_torch_model_no_process_loads_torch(server: ServerProcess) -> None:
    for pid in (server.process.pid, *workers_of(server)):
        assert "libtorch" not in maps(pid)


def test_calls_are_answered_while_workers_are_killed(tmp_path: Path, photo: bytes) -> None:
    with ServerProcess(log=tmp_path / "log") as server, connect(server) as channel:
        segment = SegmentationServiceStub(channel).Segment
        expected = {x: segment(request(photo, x)).predictions for x in (30.0, 60.0, 90.0)}
        (first,) = workers_of(server)
        with ThreadPoolExecutor() as threads:
            calls = [(x, threads.submit(segment, request(photo, x))) for _ in range(4) for x in expected]
            calls[0][1].result()  # the others are under way
            os.kill(first, signal.SIGKILL)
            for x, call in calls:
                assert call.result().predictions == expected[x]
        (second,) = workers_of(server)
        assert second != first
        assert f"worker {first} ended with status -9; another one is started" in server.log_text()
        server.terminate()
        assert server.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_the_models_can_run_in_the_servers_own_process(tmp_path: Path, photo: bytes) -> None:
    with ServerProcess("--engine", "inline", log=tmp_path / "log") as server, connect(server) as channel:
        assert len(SegmentationServiceStub(channel).Segment(request(photo, 30)).predictions) == 1
        assert workers_of(server) == []


def test_a_worker_for_each_device(tmp_path: Path) -> None:
    with ServerProcess("--devices", "cpu,cpu", log=tmp_path / "log") as server:
        assert len(workers_of(server)) == 2
