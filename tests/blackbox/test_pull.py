"""Fetching a checkpoint from a hub on the loopback interface, and serving it afterwards."""

import hashlib
import http.server
import os
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from segrpc.service.models.sam2.catalog import VARIANTS
from tests.checkpoints import write_checkpoint
from tests.server_process import ServerProcess
from tests.web_server import web_server

TINY = VARIANTS["sam2.1-hiera-tiny"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub that has one file; ``announced`` is the SHA-256 that it tells."""

    url: str
    content: bytes
    announced: str


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of SAM 2.1 tiny."""
    return write_checkpoint(TINY.name, tmp_path_factory.mktemp("content")).read_bytes()


@pytest.fixture
def hub(content: bytes) -> Iterator[Hub]:
    """A hub with a checkpoint of SAM 2.1 tiny, where the published one is."""
    state = Hub("", content, hashlib.sha256(content).hexdigest())

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            if self.path != f"/{TINY.hub_id}/resolve/main/{TINY.filename}":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("ETag", f'"{state.announced}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(state.content)))
            self.end_headers()
            if with_body:
                self.wfile.write(state.content)

    with web_server(Handler) as host:
        state.url = f"http://{host}"
        yield state


def pull(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a terminal as standard error, where progress is shown."""
    command = [sys.executable, "-m", "segrpc.service.cli", "pull", TINY.name, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment) as process:
        os.close(terminal)
        said = b""
        try:
            while piece := os.read(controller, 65536):
                said += piece
        except OSError:  # Linux's way to say that the terminal was closed at the other end
            pass
        finally:
            os.close(controller)
        output, _ = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, output, said.decode())


def test_a_fetched_checkpoint_is_served(tmp_path: Path, hub: Hub) -> None:
    home = tmp_path / "home"
    result = pull(hub, home)
    assert result.returncode == 0, result.stderr
    assert f"segrpc-server serve --model {TINY.name}" in result.stdout
    assert TINY.filename in result.stderr
    assert "100%" in result.stderr  # of the progress bar
    offline = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
    with ServerProcess("--model", TINY.name, log=tmp_path / "log", environment=offline) as server:
        assert f"is serving {TINY.name} on" in server.greeting


def test_what_arrives_damaged_is_removed(tmp_path: Path, hub: Hub) -> None:
    hub.announced = hashlib.sha256(b"something else").hexdigest()
    result = pull(hub, tmp_path / "home")
    assert result.returncode == 1
    assert "arrived damaged and was removed" in result.stderr
    assert not list((tmp_path / "home").rglob(TINY.filename))
    hub.announced = hashlib.sha256(hub.content).hexdigest()
    assert pull(hub, tmp_path / "home").returncode == 0


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path, hub: Hub) -> None:
    hub.content = write_checkpoint("sam2.1-hiera-small", tmp_path).read_bytes()
    hub.announced = hashlib.sha256(hub.content).hexdigest()
    result = pull(hub, tmp_path / "home")
    assert result.returncode == 1
    assert "its weights look like sam2.1-hiera-small" in result.stderr


def test_a_repository_without_the_file(tmp_path: Path, hub: Hub) -> None:
    result = pull(hub, tmp_path / "home", "--hub-id", "someone/nothing")
    assert result.returncode == 1
    assert "cannot be fetched" in result.stderr
    assert "Traceback" not in result.stderr
