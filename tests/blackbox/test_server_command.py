"""The command ``segrpc-server``: starting, settings from three sources, and what it says when something is wrong."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest
import torch

from segrpc.v1.model_service_pb2 import ListModelsRequest, Model
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from tests.blackbox.failure import failure_of
from tests.checkpoints import write_checkpoint
from tests.server_process import ServerProcess, connect, raw


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "segrpc.service.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **(environment or {})}, check=False
    )


def models_of(server: ServerProcess) -> list[Model]:
    with connect(server) as channel:
        return list(ModelServiceStub(channel).ListModels(ListModelsRequest()).models)


def test_it_says_where_it_serves(server: ServerProcess) -> None:
    host, _, port = server.target.partition(":")
    assert server.greeting == f"segrpc-server is serving grabcut on {host}:{port}"
    assert int(port) > 0


def test_the_model_and_its_limits_are_described(server: ServerProcess) -> None:
    (model,) = models_of(server)
    assert (model.name, model.family, model.is_default, model.mask_size) == ("grabcut", "grabcut", True, 256)
    assert (model.points, model.boxes, model.mask_input, model.embeddings) == (True, True, True, False)
    assert list(model.mask_counts) == [1, 3]
    limits = model.limits
    assert (limits.max_image_bytes, limits.max_image_pixels) == (64 * 2**20, 64_000_000)
    assert (limits.max_prompts, limits.max_points, limits.max_chunk_bytes) == (64, 1024, 2**20)


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('max_prompts = 1\nmax_points = 1\nmax_image_bytes = "1MiB"\n')
    environment = {"SEGRPC_MAX_PROMPTS": "2", "SEGRPC_MAX_POINTS": "2"}
    options = ["--config", str(config), "--max-prompts", "3"]
    with ServerProcess(*options, log=tmp_path / "log", environment=environment) as server:
        limits = models_of(server)[0].limits
    assert (limits.max_prompts, limits.max_points, limits.max_image_bytes) == (3, 2, 2**20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    with ServerProcess(log=tmp_path / "log") as server:
        server.process.send_signal(number)
        assert server.wait() == 0
        assert "Traceback" not in server.log_text()


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert result.returncode == 1
    assert "cannot listen on" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--model", "sam3"], 1, "there is no model 'sam3'; known are: grabcut, sam2"),
        (["--model", "sam2.1-hiera-tiny"], 1, "segrpc-server pull sam2.1-hiera-tiny"),
        (["--checkpoint", "/nonexistent/sam2.1_hiera_tiny.pt"], 1, "is not a file"),
        (["--model", "grabcut", "--dtype", "bfloat16"], 1, "dtype"),
        (["--max-prompts", "0"], 2, "max_prompts"),
        (["--dtype", "float64"], 2, "dtype"),
        (["--config", "/nonexistent.toml"], 1, "/nonexistent.toml"),
    ],
)
def test_a_wrong_option_is_explained(tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    result = run("serve", "--listen", "127.0.0.1:0", *arguments, environment={"HF_HOME": str(tmp_path)})
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_setting_in_the_file_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("max_promts = 1\n")
    result = run("serve", "--config", str(config))
    assert result.returncode == 2
    assert "max_promts" in result.stderr


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50_000])


def no_weights(file: Path) -> None:
    torch.save({"weights": {}}, file)


def another_size(file: Path) -> None:
    small = write_checkpoint("sam2.1-hiera-small", file.parent)
    small.rename(file)


def a_text(file: Path) -> None:
    file.write_text("not a checkpoint")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged, "corrupt"),
        (a_text, "corrupt"),
        (no_weights, "no SAM 2 weights"),
        (another_size, "its weights look like sam2.1-hiera-small"),
    ],
)
def test_a_wrong_checkpoint_is_explained(tmp_path: Path, damage: object, said: str) -> None:
    file = write_checkpoint("sam2.1-hiera-tiny", tmp_path)
    damage(file)  # type: ignore[operator]
    result = run("serve", "--listen", "127.0.0.1:0", "--checkpoint", str(file))
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_the_size_of_a_renamed_checkpoint_is_told_from_its_weights(tmp_path: Path) -> None:
    file = write_checkpoint("sam2-hiera-small", tmp_path).rename(tmp_path / "mine.pt")
    with ServerProcess("--checkpoint", str(file), log=tmp_path / "log") as server:
        (model,) = models_of(server)
    assert (model.name, model.family, model.input_size, model.mask_size) == ("mine", "sam2", 1024, 256)


def test_a_second_server_does_not_share_the_port(server: ServerProcess) -> None:
    result = run("serve", "--listen", server.target)
    assert result.returncode == 1
    with connect(server) as channel:
        assert raw(channel, "/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"


def test_reflection_can_be_turned_off(tmp_path: Path) -> None:
    with ServerProcess("--no-reflection", log=tmp_path / "log") as server, connect(server) as channel:
        reflection = raw(channel, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", client_streams=True)
        assert failure_of(lambda: reflection(iter([b""]))).code is grpc.StatusCode.UNIMPLEMENTED
