"""A real server in a process of its own, on a free port of the loopback interface."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

# Options of a connection on which little is taken ahead of the reader.
NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16))


class Reachable(Protocol):
    """A server, or a way to one, at ``HOST:PORT``."""

    target: str


def connect(server: Reachable, *options: tuple[str, int]) -> grpc.Channel:
    """Open a connection that is not shared with other channels of this process."""
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1), *options]
    return grpc.insecure_channel(server.target, options=own)


def raw(channel: grpc.Channel, method: str, *, client_streams: bool = False) -> Callable[..., Any]:
    """Return a method that takes and gives bytes, for messages that no stub would send."""
    make: Any = channel.stream_unary if client_streams else channel.unary_unary
    called: Callable[..., Any] = make(method)
    return called


class ServerProcess:
    """Starts ``segrpc-server serve`` and waits until it says that it serves. Use it in a ``with`` statement.

    Args:
        *arguments: Options of ``serve``.
        log: The file that standard error goes to.
        environment: Variables to add.

    Without ``--device`` it sees no GPU: what is compared bit for bit is so on a CPU.
    """

    def __init__(self, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "segrpc.service.cli", "serve", "--listen", "127.0.0.1:0", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **_gpus(arguments), **(environment or {})},
            )
        assert self.process.stdout is not None
        # The line comes, or the end of the file because the process ended: either way this returns.
        self.greeting = self.process.stdout.readline().strip()
        if " on " not in self.greeting:
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError(f"the server did not start: {self.greeting}\n{self.log_text()}")
        self.target = self.greeting.rpartition(" ")[2]

    def log_text(self) -> str:
        """What the server wrote to standard error so far."""
        return self._log.read_text("utf-8", errors="replace")

    def stats(self) -> dict[str, Any]:
        """What the server holds at the moment; see `segrpc.service.rpc.server.Server.stats`."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGUSR1)
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def wait_for(self, settled: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
        """Ask for the statistics until they are as expected; fails if they never are."""
        deadline = time.monotonic() + seconds
        while not settled(stats := self.stats()):
            if time.monotonic() > deadline:
                raise AssertionError(f"the server did not settle: {stats}\n{self.log_text()[-4000:]}")
        return stats

    def settle(self, before: Mapping[str, Any], seconds: float = 30.0) -> None:
        """Wait until the server holds no more than before, as `stats` tells."""
        self.wait_for(
            lambda stats: (
                stats["engine"]["pending"] == 0
                and all(
                    stats[key] <= before[key] for key in ("calls", "sessions", "attached_sessions", "session_bytes")
                )
                and stats["tasks"] <= before["tasks"]
            ),
            seconds,
        )

    def worker_pids(self) -> list[int]:
        """The processes that the server started and that still run."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(pid) for file in children for pid in file.read_text("ascii").split())

    def resident_bytes(self) -> int:
        """The memory that the process holds."""
        return _resident_bytes(self.process.pid)

    def peak_bytes(self) -> int:
        """The most memory that the process ever held."""
        return _peak_bytes(self.process.pid)

    def worker_peak_bytes(self) -> int:
        """The most memory that each of its workers ever held, together."""
        return sum(map(_peak_bytes, self.worker_pids()))

    def worker_resident_bytes(self) -> int:
        """The memory that its workers hold; of those that end meanwhile, nothing."""
        total = 0
        for pid in self.worker_pids():
            with suppress(FileNotFoundError, ProcessLookupError):
                total += _resident_bytes(pid)
        return total

    def terminate(self) -> None:
        """Ask it to stop, as an operator would; does not wait."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for its end and return the exit status."""
        return self.process.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _gpus(arguments: Sequence[str]) -> dict[str, str]:
    return {} if "--device" in arguments else {"CUDA_VISIBLE_DEVICES": ""}


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
