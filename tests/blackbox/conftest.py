"""Servers for black-box tests: real processes, asked over real sockets."""

from collections.abc import Iterator

import grpc
import pytest

from tests.checkpoints import write_checkpoint
from tests.photos import photo_bytes
from tests.server_process import ServerProcess, connect
from tests.third_party import install


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the GrabCut model and default settings."""
    with ServerProcess(log=tmp_path_factory.mktemp("server") / "log") as process:
        yield process


@pytest.fixture(scope="session")
def sam2_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with SAM 2.1 tiny and random weights."""
    folder = tmp_path_factory.mktemp("sam2-server")
    checkpoint = write_checkpoint("sam2.1-hiera-tiny", folder)
    with ServerProcess("--checkpoint", str(checkpoint), "--threads", "2", log=folder / "log") as process:
        yield process


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the package of third-party models is installed."""
    return install(tmp_path_factory.mktemp("third-party"))


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A small photo as JPEG."""
    return photo_bytes("chelsea")


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    """A connection of its own to the default server."""
    with connect(server) as opened:
        yield opened
